"""Model families as data: which published fields and tensors mean which of ours, readable in both directions.

A family is one record. To add one, write its `Family`: the config fields that become features of `ModelConfig`, those
that must have one value because the forward pass knows no other, those that change no result, and one `Row` per
parameter. Anything that a published model says and its family does not list is refused rather than ignored.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from jaxsteer.models.config import ModelConfig
from jaxsteer.models.families.gemma import GEMMA2, GEMMA3
from jaxsteer.models.families.gpt2 import GPT2
from jaxsteer.models.families.llama import LLAMA, MISTRAL, SMOLLM3
from jaxsteer.models.families.olmo import OLMO2
from jaxsteer.models.families.phi import PHI3
from jaxsteer.models.families.qwen import QWEN2, QWEN3
from jaxsteer.models.families.rope import ROPE_FIELDS, rope_from_hf, rope_to_hf
from jaxsteer.models.families.table import GENERAL_FIXED, IDENTITY, REQUIRED, ROTARY, TRANSPOSE, Family, Row, Transform

__all__ = [
    "FAMILIES",
    "IDENTITY",
    "ROTARY",
    "TRANSPOSE",
    "Family",
    "Row",
    "Transform",
    "config_from_hf",
    "config_to_hf",
    "families_of",
    "flags_of_layers",
    "model_config",
    "unrotated_layers",
    "window_fields",
]

FAMILIES: dict[str, Family] = {
    family.name: family for family in (LLAMA, MISTRAL, SMOLLM3, QWEN2, QWEN3, GEMMA2, GEMMA3, OLMO2, PHI3, GPT2)
}
"""Every family by our name."""

_LAYER_TYPES = {"sliding_attention": True, "full_attention": False}
_KINDS: dict[str, type] = {
    **dict.fromkeys(("norm_eps", "query_scale", "attn_softcap", "final_softcap"), float),
    **dict.fromkeys(("tied_head", "attn_bias", "mlp_bias"), bool),
}
_OPTIONAL = ("attn_softcap", "final_softcap")
"""Fields that null switches off."""

_LAYERS_LIMIT = 100_000  # of models whose layers differ: a file that lies must not make a tuple of billions


def families_of(kind: str, name: Any, where: str) -> list[Family]:
    """The families with this published name; GGUF has one for several.

    Args:
        kind: "hf_type" (`model_type` of a config.json) or "gguf" (`general.architecture`).
        name: the published name.
        where: the file, for the message.

    Raises:
        ValueError: no family has it.
    """
    if found := [family for family in FAMILIES.values() if name and getattr(family, kind) == name]:
        return found
    key = "model_type" if kind == "hf_type" else "general.architecture"
    known = ", ".join(dict.fromkeys(getattr(family, kind) for family in FAMILIES.values()))
    raise ValueError(f"{where}: {key} is {name!r}; the families known here are {known}")


def config_from_hf(raw: Mapping[str, Any], where: str) -> tuple[Family, ModelConfig]:
    """Read a Hugging Face config.json.

    Args:
        raw: its content.
        where: the file, for messages.

    Raises:
        ValueError: an unknown family; a field that is missing, of the wrong type, or that the family does not
            know how to follow. The message names the field and its value.
    """
    (family,) = families_of("hf_type", raw.get("model_type"), where)
    read: dict[str, Any] = {}
    for ours, (name, default) in family.fields.items():
        value = raw.get(name)
        if value is None and not (ours in _OPTIONAL and name in raw):
            if default is REQUIRED:
                raise ValueError(f"{where}: {name} is missing; a {family.name} config must say it")
            value = default(read) if callable(default) else default
        read[ours] = None if value is None and ours in _OPTIONAL else _typed(value, ours, name, where)
    read.setdefault("kv_heads", read["heads"])
    read.setdefault("head_dim", read["width"] // max(read["heads"], 1))
    _refuse_unknown(family, raw, where)
    if "query_scale" in read:
        if read["query_scale"] <= 0:
            raise ValueError(f"{where}: query_pre_attn_scalar is {read['query_scale']}; expected a positive number")
        read["query_scale"] **= -0.5
    windows = _windows(family, raw, read["layers"], where)
    rope = rope_from_hf(raw, read["max_length"], where, theta=family.theta, local_theta=family.local_theta)
    if "window" not in windows:
        rope.pop("local_rope_theta", None)
    still = unrotated_layers(family, raw, read["layers"], where)
    return family, model_config({**read, **family.features, **windows, **still, **rope}, where)


def model_config(fields: Mapping[str, Any], where: str) -> ModelConfig:
    """The config with these fields.

    Raises:
        ValueError: no model can have them; the message names the file.
    """
    try:
        return ModelConfig(**fields)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


def _refuse_unknown(family: Family, raw: Mapping[str, Any], where: str) -> None:
    handled = {name for name, _ in family.fields.values()} | family.ignored | ROPE_FIELDS
    if family.local_theta is None:
        handled -= {"rope_local_base_freq"}
    if (windows := family.windows) is not None:
        handled |= {"sliding_window", "layer_types", windows.switch} | windows.ignored
    if family.unrotated is not None:
        handled |= {"no_rope_layers", "no_rope_layer_interval"}
    for name, value in raw.items():
        if name in handled or value is None:
            continue
        if name in family.fixed and value == family.fixed[name]:
            continue
        allowed = f"only {family.fixed[name]!r} is supported" if name in family.fixed else "the field is not known"
        raise ValueError(
            f"{where}: {name} is {value!r}, but for the {family.name} family {allowed}. If it changes "
            "nothing in the forward pass, remove it from the file; otherwise this model cannot be loaded "
            "faithfully"
        )


def _typed(value: Any, ours: str, name: str, where: str) -> Any:
    """The value of a field, if it has the type of ours; a whole number passes for a float."""
    kind = _KINDS.get(ours, int)
    if kind is float and type(value) is int:
        value = float(value)
    if type(value) is not kind or (isinstance(value, float) and not math.isfinite(value)):
        raise ValueError(f"{where}: {name} is {value!r}; expected {kind.__name__}")
    return value


def _windows(family: Family, raw: Mapping[str, Any], layers: int, where: str) -> dict[str, Any]:
    """The window and which layers it holds in; {} where it holds in none."""
    windows = family.windows
    if windows is None:
        return {}
    size = raw.get("sliding_window", windows.default)  # null is no window, and no default
    said = raw.get("layer_types")
    if said is None:
        local = flags_of_layers(lambda layer: windows.local(raw, layer), layers, where)
    elif isinstance(said, list) and len(said) == layers and all(kind in _LAYER_TYPES for kind in said):
        local = tuple(_LAYER_TYPES[kind] for kind in said)
    else:
        raise ValueError(f"{where}: layer_types is {said!r}; expected {layers} words out of {', '.join(_LAYER_TYPES)}")
    if size is None or (windows.switch and not raw.get(windows.switch, False)) or not any(local):
        return {}
    if type(size) is not int or size < 1:
        raise ValueError(f"{where}: sliding_window is {size!r}; expected a positive whole number")
    return window_fields(size, local)


def window_fields(size: int, local: tuple[bool, ...]) -> dict[str, Any]:
    """The fields of a `ModelConfig` that say that these layers have a window; {} where it holds in none."""
    if not any(local):
        return {}
    return {"window": size} if all(local) else {"window": size, "local_layers": local}


def unrotated_layers(family: Family, raw: Mapping[str, Any], layers: int, where: str) -> dict[str, Any]:
    """The field of a `ModelConfig` that names layers without rotary positions; {} where all have them."""
    if (rule := family.unrotated) is None:
        return {}
    still = flags_of_layers(lambda layer: rule(raw, layer), layers, where)
    return {"unrotated_layers": still} if any(still) else {}


def flags_of_layers(rule: Callable[[int], Any], layers: int, where: str) -> tuple[bool, ...]:
    """A flag for every layer.

    Raises:
        ValueError: so many layers that only a damaged file can have them.
    """
    if layers > _LAYERS_LIMIT:
        raise ValueError(f"{where}: {layers} layers; a model whose layers differ has at most {_LAYERS_LIMIT}")
    return tuple(bool(rule(layer)) for layer in range(layers))


def config_to_hf(family: Family, config: ModelConfig) -> dict[str, Any]:
    """The config.json that transformers reads as this model; `config_from_hf` gives `config` back."""
    raw: dict[str, Any] = {"architectures": [family.hf_class], "model_type": family.hf_type}
    raw |= {name: getattr(config, ours) for ours, (name, _) in family.fields.items()}
    raw |= {name: value for name, value in family.fixed.items() if name not in GENERAL_FIXED}
    if (scale := config.query_scale) is not None:
        raw["query_pre_attn_scalar"] = round(scale**-2)  # a whole number, in every published config
    if (windows := family.windows) is not None:
        local = config.local_layers or (config.window is not None,) * config.layers
        raw["sliding_window"] = config.window
        if windows.switch:
            raw[windows.switch] = config.window is not None
        if windows.listed:
            raw["layer_types"] = [("full_attention", "sliding_attention")[flag] for flag in local]
    if family.unrotated is not None:
        raw["no_rope_layers"] = [int(not flag) for flag in config.unrotated_layers or (False,) * config.layers]
    return raw if config.learned_positions else raw | rope_to_hf(config)
