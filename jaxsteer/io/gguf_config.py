"""GGUF metadata -> ModelConfig and back. The keys are llama.cpp's; a key that is not supported is refused."""

from __future__ import annotations

import math
import reprlib
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path

import numpy as np

from jaxsteer.io.gguf_file import Gguf, GgufValue
from jaxsteer.io.llama_cpp import ROPE_DEFAULTS
from jaxsteer.io.stored import Stored, names_of, repeats_embedding, size
from jaxsteer.models.config import ModelConfig, RopeScaling
from jaxsteer.models.families import families_of, flags_of_layers, model_config, unrotated_layers, window_fields
from jaxsteer.models.families.table import REQUIRED, Family, Fields, FieldValue, Row

ROPE_FACTORS = "rope_freqs.weight"
"""Constant tensor [H/2] of a model with scaled positions: the divisor of each rotary frequency."""

LONGROPE_FACTORS = ("rope_factors_long.weight", "rope_factors_short.weight")
"""The same for long and short contexts; models that have these are not supported."""

_IGNORED = {"rope.scaling.finetuned", "rope.scaling.original_context_length", "attention.causal", "tensor_data_layout"}
"""Keys (without the architecture's prefix) that add nothing to the others."""

_ZERO = {"expert_count", "expert_used_count", "attention.sliding_window", "attention.clamp_kqv"}
"""Keys of features that 0 disables; a family that has the feature lists its key in `gguf_keys`."""

_KINDS: dict[str, type] = {
    **dict.fromkeys(("norm_eps", "rope_theta", "local_rope_theta", "query_scale"), float),
    **dict.fromkeys(("attn_softcap", "final_softcap"), float),
}
_OPTIONAL = ("attn_softcap", "final_softcap")
"""Fields that 0 disables."""


def config_from_gguf(file: Gguf) -> tuple[Family, ModelConfig]:
    """Read the model's family and config from a GGUF file's metadata, and from which tensors it holds.

    Raises:
        ValueError: an unknown architecture; a key that is missing, has the wrong type, or is not supported.
    """
    where = str(file.path)
    families = families_of("gguf", file.metadata.get("general.architecture"), where)
    prefix = f"{families[0].gguf}."
    keys = {key.removeprefix(prefix): v for key, v in file.metadata.items() if key.startswith(prefix)}
    family = min(families, key=lambda family: len(_unknown(family, keys)))
    if unknown := _unknown(family, keys):
        raise ValueError(
            f"{where}: "
            + ", ".join(f"{prefix}{key} is {reprlib.repr(keys[key])}" for key in unknown)
            + f", which is not supported for the {family.name} family; this model cannot be loaded faithfully"
        )
    vocab, width = _embedding(file, family)
    read: Fields = {"vocab_size": vocab, "width": width}
    for ours, (key, default) in family.gguf_keys.items():
        if key in keys:
            read[ours] = _typed(keys[key], ours, f"{where}: {prefix}{key}")
        elif default is REQUIRED:
            raise ValueError(f"{where}: {prefix}{key} is missing")
        else:
            read[ours] = default(read) if callable(default) else default
    for key, expected in _implied(read).items():
        if keys.get(key, expected) != expected:
            raise ValueError(
                f"{where}: {prefix}{key} is {reprlib.repr(keys[key])}; only {expected} is supported for this model"
            )
    read |= {ours: read[ours] or None for ours in _OPTIONAL if ours in read}
    read |= _windows(read.pop("window", 0), read.pop("local_layers", 0), read["layers"], where)
    if "window" not in read:
        read.pop("local_rope_theta", None)
    read |= unrotated_layers(family, {}, read["layers"], where)
    read |= {row.when: row.gguf.replace("{i}", "0") in file.tensors for row in family.rows if row.when}
    read |= {row.unless: _is_tied(file, row, family) for row in family.rows if row.unless}
    if "rope_theta" in read:
        read["rope_scaling"] = _scaling(file, read["rope_theta"], read["head_dim"], keys, where)
    return family, model_config(read | dict(family.features), where)


def _unknown(family: Family, keys: Mapping[str, GgufValue]) -> list[str]:
    """The keys that are not supported for a family."""
    known = {key for key, _ in family.gguf_keys.values()} | set(_implied(family.gguf_keys)) | _IGNORED
    if "rope_theta" in family.gguf_keys:
        known |= set(ROPE_DEFAULTS)
    return [key for key, value in keys.items() if key not in known and not (key in _ZERO and value == 0)]


def _implied(read: Mapping[str, object]) -> dict[str, object]:
    """Keys that must repeat what others say, with the value they must have.

    `read` has our fields, or anything else by their names if only the keys matter.
    """
    head_dim = read.get("head_dim")
    same: dict[str, object] = {"embedding_length": read.get("width"), "vocab_size": read.get("vocab_size")}
    same |= dict.fromkeys(
        ("attention.value_length", "attention.key_length_swa", "attention.value_length_swa"), head_dim
    )
    if "rope_theta" in read:
        same |= dict.fromkeys(("rope.dimension_count", "rope.dimension_count_swa"), head_dim)
        if "local_rope_theta" not in read:
            same["rope.freq_base_swa"] = read["rope_theta"]
    return same


def _embedding(file: Gguf, family: Family) -> tuple[int, ...]:
    """V and D, the shape of the token embedding."""
    name = next(row.gguf for row in family.rows if row.path == "embed/embedding")
    if name not in file.tensors:
        raise ValueError(f"{file.path}: the tensor {name} is missing; is this a part of a split model?")
    shape = file.tensors[name].shape
    if len(shape) != 2:
        raise ValueError(f"{file.path}: {name} has shape {list(shape)}; expected two axes")
    return shape


def _is_tied(file: Gguf, row: Row, family: Family) -> bool:
    """Whether the head is tied: not stored, or stored as a copy of the embedding, as old converters did."""
    return row.gguf not in file.tensors or repeats_embedding(file.tensors, row.gguf, "gguf", family)


def _typed(value: GgufValue, ours: str, what: str) -> FieldValue | list[bool]:
    """The value of a key, checked against the type of our field; `what` is the file and key, for the message."""
    if ours == "local_layers":
        if type(value) is int:
            return value
        if isinstance(value, list) and all(type(flag) is bool for flag in value):
            return [flag is True for flag in value]
        raise ValueError(f"{what} is {reprlib.repr(value)}; expected a period or a flag for each layer")
    kind = _KINDS.get(ours, int)
    if isinstance(value, list) and value and all(type(item) is kind and item == value[0] for item in value):
        value = value[0]  # the same in every layer
    if type(value) is not kind or (isinstance(value, float) and not math.isfinite(value)):
        raise ValueError(f"{what} is {reprlib.repr(value)}; expected one {kind.__name__} for all layers")
    if isinstance(value, float):  # stored as fp32: 1e-05 comes back as 9.99e-06 unless read as the shortest decimal
        return float(str(np.float32(value)))
    assert isinstance(value, int)
    return value


def _windows(size: int, local: int | list[bool], layers: int, where: str) -> Fields:
    """The window and its layers; {} if no layer has one."""
    if size == 0:
        return {}
    if isinstance(local, list):
        if len(local) != layers:
            raise ValueError(f"{where}: attention.sliding_window_pattern has {len(local)} flags for {layers} layers")
        return window_fields(size, tuple(local))
    return window_fields(size, flags_of_layers(lambda layer: local == 0 or layer % local < local - 1, layers, where))


def parameters_of(file: Gguf) -> dict[str, Stored]:
    """The file's tensors without the constants, which `config_from_gguf` reads."""
    return {name: tensor for name, tensor in file.tensors.items() if name != ROPE_FACTORS}


def _scaling(file: Gguf, theta: float, head_dim: int, keys: Mapping[str, GgufValue], where: str) -> RopeScaling | None:
    """How rotary positions are scaled, from the metadata or from the tensor of factors; None if they are not."""
    said = ROPE_DEFAULTS | {key: value for key, value in keys.items() if key in ROPE_DEFAULTS}
    kind, attention = said["rope.scaling.type"], said["rope.scaling.attn_factor"]
    factor = keys.get("rope.scaling.factor", said["rope.scale_linear"])
    if kind == "none" or factor == 0.0:
        factor = 1.0
    if long := [name for name in LONGROPE_FACTORS if name in file.tensors]:
        raise ValueError(
            f"{where}: {', '.join(long)}: the rotary positions are scaled by longrope; supported are none, linear and "
            "llama3's factors. Use the model's variant for short contexts"
        )
    if kind not in ("none", "linear") or attention != 1.0:
        raise ValueError(
            f"{where}: rope.scaling.type is {reprlib.repr(kind)} and rope.scaling.attn_factor is "
            f"{reprlib.repr(attention)}; supported are none, linear and llama3's factors, with an attention factor of 1"
        )
    linear = factor != 1.0
    if not isinstance(factor, float) or (linear and not 0 < factor < math.inf):
        raise ValueError(f"{where}: rope.scaling.factor is {reprlib.repr(factor)}; expected a positive number")
    if ROPE_FACTORS not in file.tensors:
        return RopeScaling("linear", float(str(np.float32(factor)))) if linear else None
    factors = file.tensors[ROPE_FACTORS]
    if linear or factors.shape != (head_dim // 2,):
        raise ValueError(
            f"{where}: {ROPE_FACTORS} has shape {list(factors.shape)} and linear scaling is "
            f"{'on' if linear else 'off'}; expected shape [{head_dim // 2}] and off"
        )
    scaling = scaling_from_factors(factors.read().astype(np.float64), theta)
    if scaling is None:
        raise ValueError(
            f"{where}: {ROPE_FACTORS} does not follow Llama 3's rule for scaled frequencies (kept, "
            "blended, divided); no other rule is supported"
        )
    return None if scaling.factor == 1.0 else scaling


def scaling_from_factors(factors: np.ndarray, theta: float) -> RopeScaling | None:
    """The llama3 scaling that divides the rotary frequencies by these factors.

    A frequency that makes t turns within the original context is divided by 1 / (keep + (1 - keep) / factor) with
    keep = clip((t - low) / (high - low), 0, 1). This depends only on the ratios of low, high and the original length,
    so one of them must be chosen: the (1, 4, 8192) of published models is tried first, then low = 1 is assumed.

    Args:
        factors: fp64 [H/2].
        theta: the rotary base.

    Returns:
        The scaling, with factor 1.0 if all factors are 1; None if the factors follow another rule.
    """
    half = len(factors)
    factor = float(str(np.float32(factors.max())))
    if not np.isfinite(factors).all() or factors.min() < 1.0 - 1e-6:
        return None
    if factor == 1.0:
        return RopeScaling("llama3", 1.0)
    rate = theta ** (-np.arange(half) / half) / (2 * math.pi)  # turns per token
    keep = (1 / factors - 1 / factor) / (1 - 1 / factor)
    candidates = [RopeScaling("llama3", factor, 1.0, 4.0, 8192)]
    blended = (keep > 1e-4) & (keep < 1 - 1e-4)
    if blended.sum() >= 2:
        slope, offset = np.polyfit(rate[blended], keep[blended], 1)
        if slope > 0 > offset:
            high, original = 1 - 1 / offset, -slope / offset
            candidates.append(RopeScaling("llama3", factor, 1.0, round(high, 3), round(original)))
    for scaling in candidates:
        turns = scaling.original_length * rate
        keep = np.clip((turns - scaling.low_factor) / (scaling.high_factor - scaling.low_factor), 0.0, 1.0)
        if np.allclose(1 / (keep + (1 - keep) / factor), factors, rtol=1e-4):
            return scaling
    return None


def config_to_gguf(family: Family, config: ModelConfig) -> dict[str, GgufValue]:
    """The metadata from which llama.cpp and `config_from_gguf` read this model; for the rest see `rope_factors`."""
    said: dict[str, GgufValue] = {
        "block_count": config.layers,
        "embedding_length": config.width,
        "vocab_size": config.vocab_size,
        "attention.value_length": config.head_dim,
    }
    for ours, (key, _) in family.gguf_keys.items():
        # llama.cpp has a scale of its own for each family; the key is another family's.
        if ours not in ("window", "local_layers", "query_scale") and (value := getattr(config, ours)) is not None:
            said[key] = value
    if "window" in family.gguf_keys:
        said |= _windows_to_gguf(family, config)
    if not config.learned_positions:
        said["rope.dimension_count"] = config.head_dim
    if (scaling := config.rope_scaling) is not None and scaling.kind == "linear":
        said |= {"rope.scaling.type": "linear", "rope.scaling.factor": scaling.factor}
    return {"general.architecture": family.gguf} | {f"{family.gguf}.{key}": value for key, value in said.items()}


def _windows_to_gguf(family: Family, config: ModelConfig) -> dict[str, GgufValue]:
    """The keys of the window and its layers."""
    size_key = family.gguf_keys["window"][0]
    if "local_layers" not in family.gguf_keys:
        return {} if config.window is None else {size_key: config.window}
    layers_key = family.gguf_keys["local_layers"][0]
    if config.window is None:
        return {size_key: 0}
    flags = config.local_layers or (True,) * config.layers
    periods = (
        n for n in range(config.layers + 1) if all(flag == (not n or i % n < n - 1) for i, flag in enumerate(flags))
    )
    local: GgufValue = next(periods, list[GgufValue](flags))
    return {size_key: config.window, layers_key: local}


def rope_factors(config: ModelConfig) -> np.ndarray | None:
    """The tensor ROPE_FACTORS, fp32 [H/2], for llama3's scaling; None for others. See `scaling_from_factors`."""
    if (scaling := config.rope_scaling) is None or scaling.kind != "llama3":
        return None
    rate = config.rope_theta ** (-np.arange(config.head_dim // 2) / (config.head_dim // 2)) / (2 * math.pi)
    turns = scaling.original_length * rate
    keep = np.clip((turns - scaling.low_factor) / (scaling.high_factor - scaling.low_factor), 0.0, 1.0)
    return (1 / (keep + (1 - keep) / scaling.factor)).astype(np.float32)


def refuse_config(family: Family, config: ModelConfig) -> list[str]:
    """Why llama.cpp would not compute a model with this config, a sentence for each reason."""
    there = family.llama_cpp
    flags = [flag for flag in ("attn_bias", "mlp_bias") if flag not in there.biases]
    reasons = [
        f"llama.cpp has no {flag}, which is {getattr(config, flag)} in the model"
        for flag in (*flags, *there.ignored)
        if getattr(config, flag)
    ]
    if rope_factors(config) is not None and not there.rope_factors:
        reasons.append("llama.cpp has no llama3 scaling of rotary positions, which the model has")
    if config.window is None and there.windowed:
        reasons.append("llama.cpp needs a sliding window, which the model does not have")
    reasons = [f"{reason} ({family.gguf})" for reason in reasons]
    try:
        found = config_from_gguf(_header(family, config))[1]
    except ValueError as error:
        return [*reasons, str(error)]
    return reasons + [
        f"{field.name} is {getattr(config, field.name)}, but a GGUF file of a {family.name} model says "
        f"{getattr(found, field.name)}"
        for field in fields(config)
        if getattr(found, field.name) != getattr(config, field.name)
    ]


def _header(family: Family, config: ModelConfig) -> Gguf:
    """A file with this config's metadata and the shapes of its tensors, each filled with another number."""
    tensors = {}
    for number, row in enumerate(family.parameters(config)):
        for name in names_of(row, "gguf", config):
            shape = row.shape(config)
            filled = np.broadcast_to(np.float32(number), shape)
            tensors[name] = Stored(shape, 4 * size(shape), lambda index=(), filled=filled: filled[index])
    if (factors := rope_factors(config)) is not None:
        tensors[ROPE_FACTORS] = Stored(factors.shape, factors.nbytes, lambda index=(): factors[index])
    return Gguf(Path(f"{family.name}.gguf"), config_to_gguf(family, config), tensors)
