"""GGUF metadata -> ModelConfig. The keys are llama.cpp's; any that is not known here is refused."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from jaxsteer.io.gguf_file import Gguf
from jaxsteer.io.stored import Stored
from jaxsteer.models.config import ModelConfig, RopeScaling
from jaxsteer.models.families import Family, family_of

ROPE_FACTORS = "rope_freqs.weight"
"""Constant tensor [H/2] of a scaled model: what each rotary frequency is to be divided by."""

_IGNORED = {"rope.scaling.finetuned", "rope.scaling.original_context_length", "attention.causal"}
"""Keys (without the architecture's prefix) that change nothing once the others are followed."""

_ZERO = {"expert_count", "expert_used_count", "attention.sliding_window", "attention.clamp_kqv"}
"""Keys of features that are off at 0 and that the forward pass does not have."""


def config_from_gguf(file: Gguf) -> tuple[Family, ModelConfig]:
    """Read the model's features from a GGUF file's metadata, and from which tensors it holds.

    Raises:
        ValueError: an unknown architecture; a key that is missing, of the wrong type, or not known.
    """
    where = str(file.path)
    family = family_of("gguf", file.metadata.get("general.architecture"), where)
    prefix = f"{family.gguf}."
    left = {key.removeprefix(prefix): v for key, v in file.metadata.items() if key.startswith(prefix)}

    def number(key: str, default: Any = None, kind: type[int] | type[float] = int) -> Any:
        value: Any = left.pop(key, default)
        if value is None:
            raise ValueError(f"{where}: {prefix}{key} is missing")
        if type(value) is not kind or (kind is float and not math.isfinite(value)):
            raise ValueError(f"{where}: {prefix}{key} is {value!r}; expected one {kind.__name__} for all layers")
        # Stored as fp32: 1e-05 comes back as 9.99e-06 unless it is read as the shortest decimal.
        return float(str(np.float32(value))) if kind is float else value

    embedding = next(row.gguf for row in family.rows if row.path == "embed/embedding")
    if embedding not in file.tensors:
        raise ValueError(f"{where}: the tensor {embedding} is missing; is this a part of a split model?")
    vocab, width = file.tensors[embedding].shape
    heads = number("attention.head_count")
    head_dim = number("attention.key_length", width // max(heads, 1))
    for key, expected in (
        ("embedding_length", width),
        ("vocab_size", vocab),
        ("attention.value_length", head_dim),
        ("rope.dimension_count", head_dim),
    ):
        if (value := left.pop(key, expected)) != expected:
            raise ValueError(f"{where}: {prefix}{key} is {value!r}; only {expected} is supported for this model")
    flags: dict[str, Any] = {row.when: row.gguf.replace("{i}", "0") in file.tensors for row in family.rows if row.when}
    flags |= {row.unless: row.gguf not in file.tensors for row in family.rows if row.unless}
    theta = number("rope.freq_base", 10_000.0, float)
    kind, factor = left.pop("rope.scaling.type", "none"), left.pop("rope.scaling.factor", 1.0)
    config = ModelConfig(
        vocab_size=vocab,
        width=width,
        layers=number("block_count"),
        heads=heads,
        kv_heads=number("attention.head_count_kv", heads),
        head_dim=head_dim,
        mlp_width=number("feed_forward_length"),
        norm_eps=number("attention.layer_norm_rms_epsilon", kind=float),
        rope_theta=theta,
        rope_scaling=_scaling(file, theta, head_dim, kind, left.pop("rope.scale_linear", factor), where),
        max_length=number("context_length"),
        **family.features,
        **flags,
    )
    for key, value in left.items():
        if key not in _IGNORED and not (key in _ZERO and value == 0):
            raise ValueError(
                f"{where}: {prefix}{key} is {value!r}, but for the {family.name} family this key is not "
                "known; this model cannot be loaded faithfully"
            )
    return family, config


def parameters_of(file: Gguf) -> dict[str, Stored]:
    """The file's tensors without the constants that `config_from_gguf` has read."""
    return {name: tensor for name, tensor in file.tensors.items() if name != ROPE_FACTORS}


def _scaling(file: Gguf, theta: float, head_dim: int, kind: Any, factor: Any, where: str) -> RopeScaling | None:
    if kind not in ("none", "linear"):
        raise ValueError(f"{where}: rope.scaling.type is {kind!r}; supported are none, linear and llama3's factors")
    linear = kind == "linear" or factor != 1.0
    if linear and (type(factor) is not float or not 0 < factor < math.inf):
        raise ValueError(f"{where}: rope.scaling.factor is {factor!r}; expected a positive number")
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
            f"{where}: {ROPE_FACTORS} does not follow Llama 3's rule for stretched frequencies (kept, "
            "blended, divided); no other is supported"
        )
    return None if scaling.factor == 1.0 else scaling


def scaling_from_factors(factors: np.ndarray, theta: float) -> RopeScaling | None:
    """The llama3 scaling whose divisors of the rotary frequencies are these.

    A frequency that turns t times within the original context is divided by 1 / (keep + (1 - keep) / factor)
    with keep = clip((t - low) / (high - low), 0, 1). That is one function of t / original_length, so only the
    ratios of
    the three numbers can be known: published models' (1, 4, 8192) is tried first, then low = 1 is assumed.

    Args:
        factors: fp64 [H/2].
        theta: the rotary base.

    Returns:
        The scaling; factor 1.0 where nothing is stretched; None if the numbers follow another rule.
    """
    half = len(factors)
    factor = float(str(np.float32(factors.max())))
    if not np.isfinite(factors).all() or factors.min() < 1.0 - 1e-6:
        return None
    if factor == 1.0:
        return RopeScaling("llama3", 1.0)
    rate = theta ** (-np.arange(half) / half) / (2 * math.pi)  # turns a token
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
