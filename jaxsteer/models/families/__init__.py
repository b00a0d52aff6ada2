"""Model families as data: how published config fields and tensor names map to ours, in both directions.

Each family is one `Family` record in a module of this package; reading files is `jaxsteer.io`, computing is
`jaxsteer.models.layers`. To add a family, list the config fields that map to `ModelConfig`, those of which the forward
pass supports one value, those that do not change the result, and one `Row` per parameter. A field or tensor that its
family does not list is refused, never ignored.
"""

from __future__ import annotations

import math
import reprlib
from collections.abc import Callable
from typing import Literal

from jaxsteer.models.config import ModelConfig
from jaxsteer.models.families.gemma import GEMMA2, GEMMA3
from jaxsteer.models.families.general import GENERAL_EMPTY, GENERAL_FIXED, HINTS, is_neutral, same_value
from jaxsteer.models.families.gpt2 import GPT2
from jaxsteer.models.families.llama import LLAMA, MISTRAL, SMOLLM3
from jaxsteer.models.families.olmo import OLMO2
from jaxsteer.models.families.phi import PHI3
from jaxsteer.models.families.qwen import QWEN2, QWEN3
from jaxsteer.models.families.rope import ROPE_FIELDS, rope_from_hf, rope_to_hf
from jaxsteer.models.families.table import REQUIRED, Family, Fields, FieldValue, RawConfig

__all__ = [
    "FAMILIES",
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
"""Fields that null disables."""

_LAYERS_LIMIT = 100_000
"""Layers of a model whose layers differ: a damaged file must not ask for a tuple of billions."""


def families_of(kind: Literal["hf_type", "gguf"], name: object, where: str) -> list[Family]:
    """The families with this published name; in GGUF, several may share one.

    Args:
        kind: "hf_type" for `model_type` of a config.json, "gguf" for `general.architecture`.
        name: the published name.
        where: the file, for the message.

    Raises:
        ValueError: no family has this name.
    """
    if families := [family for family in FAMILIES.values() if name and getattr(family, kind) == name]:
        return families
    key = "model_type" if kind == "hf_type" else "general.architecture"
    known = ", ".join(dict.fromkeys(getattr(family, kind) for family in FAMILIES.values()))
    raise ValueError(f"{where}: {key} is {reprlib.repr(name)}; the families known here are {known}")


def config_from_hf(raw: RawConfig, where: str) -> tuple[Family, ModelConfig]:
    """Read a Hugging Face config.json.

    Args:
        raw: its content.
        where: the file, for messages.

    Raises:
        ValueError: an unknown family; a field that is missing, has the wrong type, or is not supported for the family.
            The message names the field and its value.
    """
    (family,) = families_of("hf_type", raw.get("model_type"), where)
    read: Fields = {}
    for ours, (name, default) in family.fields.items():
        value = raw.get(name)
        if value is None and not (ours in _OPTIONAL and name in raw):
            if default is REQUIRED:
                raise ValueError(f"{where}: {name} is missing; a {family.name} config must have it")
            value = default(read) if callable(default) else default
        read[ours] = None if value is None and ours in _OPTIONAL else _typed(value, ours, name, where)
    read.setdefault("kv_heads", read["heads"])
    read.setdefault("head_dim", read["width"] // max(read["heads"], 1))
    _refuse_unknown(family, raw, read["max_length"], where)
    if "query_scale" in read:
        if read["query_scale"] <= 0:
            raise ValueError(f"{where}: query_pre_attn_scalar is {read['query_scale']}; expected a positive number")
        read["query_scale"] **= -0.5
    windows = _windows(family, raw, read["layers"], where)
    rope = rope_from_hf(raw, read["max_length"], where, theta=family.theta, local_theta=family.local_theta)
    if "window" not in windows:
        rope.pop("local_rope_theta", None)
    unrotated = unrotated_layers(family, raw, read["layers"], where)
    return family, model_config({**read, **family.features, **windows, **unrotated, **rope}, where)


def model_config(fields: Fields, where: str) -> ModelConfig:
    """The config with these fields.

    Raises:
        ValueError: no model can have them; the message begins with the file, `where`.
    """
    try:
        return ModelConfig(**fields)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


def _refuse_unknown(family: Family, raw: RawConfig, max_length: int, where: str) -> None:
    """Raise a ValueError for a field that may change a logit and that the forward pass does not follow."""
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
        if name in family.fixed and same_value(value, family.fixed[name]):
            continue
        if name not in family.fixed and is_neutral(name, value, raw, max_length):
            continue
        fixed = GENERAL_FIXED | dict(family.fixed)
        allowed = f"only {fixed[name]!r} is supported" if name in fixed else "the field is not known"
        allowed = "it must be empty" if name in GENERAL_EMPTY else allowed
        default = "if it does not change the forward pass, remove it from the file; otherwise this model cannot be "
        raise ValueError(
            f"{where}: {name} is {reprlib.repr(value)}, but for the {family.name} family {allowed}: "
            f"{HINTS.get(name, default + 'loaded faithfully')}"
        )


def _typed(value: object, ours: str, name: str, where: str) -> FieldValue:
    """The value of a published field, checked against the type of our field; an int is accepted for a float."""
    kind = _KINDS.get(ours, int)
    if kind is float and type(value) is int:
        value = float(value)
    if type(value) is not kind or (isinstance(value, float) and not math.isfinite(value)):
        raise ValueError(f"{where}: {name} is {reprlib.repr(value)}; expected {kind.__name__}")
    assert isinstance(value, bool | int | float)
    return value


def _windows(family: Family, raw: RawConfig, layers: int, where: str) -> Fields:
    """The window and its layers; {} if no layer has one."""
    windows = family.windows
    if windows is None:
        return {}
    size = raw.get("sliding_window", windows.default)  # null means no window, not the default
    types = raw.get("layer_types")
    if types is None:
        local = flags_of_layers(lambda layer: windows.local(raw, layer), layers, where)
    elif isinstance(types, list) and len(types) == layers and all(kind in _LAYER_TYPES for kind in types):
        local = tuple(_LAYER_TYPES[kind] for kind in types)
    else:
        raise ValueError(
            f"{where}: layer_types is {reprlib.repr(types)}; expected {layers} words out of {', '.join(_LAYER_TYPES)}"
        )
    if size is None or (windows.switch and not raw.get(windows.switch, False)) or not any(local):
        return {}
    if type(size) is not int or size < 1:
        raise ValueError(f"{where}: sliding_window is {reprlib.repr(size)}; expected a positive integer")
    return window_fields(size, local)


def window_fields(size: int, local: tuple[bool, ...]) -> Fields:
    """The fields of a `ModelConfig` for a window in these layers; {} if it is in none."""
    if not any(local):
        return {}
    return {"window": size} if all(local) else {"window": size, "local_layers": local}


def unrotated_layers(family: Family, raw: RawConfig, layers: int, where: str) -> Fields:
    """The field of a `ModelConfig` for layers without rotary positions; {} if all layers have them."""
    if (rule := family.unrotated) is None:
        return {}
    flags = flags_of_layers(lambda layer: rule(raw, layer), layers, where)
    return {"unrotated_layers": flags} if any(flags) else {}


def flags_of_layers(rule: Callable[[int], bool], layers: int, where: str) -> tuple[bool, ...]:
    """What `rule` says of every layer.

    Raises:
        ValueError: `rule` raised one, or there are more layers than any model has; the file is damaged.
    """
    if layers > _LAYERS_LIMIT:
        raise ValueError(f"{where}: {layers} layers; a model whose layers differ has at most {_LAYERS_LIMIT}")
    try:
        return tuple(rule(layer) for layer in range(layers))
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


def config_to_hf(family: Family, config: ModelConfig) -> RawConfig:
    """The config.json that transformers reads as this model; `config_from_hf` gives `config` back."""
    raw: RawConfig = {"architectures": [family.hf_class], "model_type": family.hf_type}
    raw |= {name: getattr(config, ours) for ours, (name, _) in family.fields.items()}
    raw |= family.fixed
    if (scale := config.query_scale) is not None:
        raw["query_pre_attn_scalar"] = round(scale**-2)  # an integer in every published config
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
