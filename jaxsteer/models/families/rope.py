"""Rotary base and scaling in published configs, in the fields of transformers 5 and of earlier versions."""

from __future__ import annotations

import math
import reprlib
from collections.abc import Mapping

from jaxsteer.models.config import ModelConfig, RopeScaling
from jaxsteer.models.families.table import Fields, RawConfig

ROPE_FIELDS = frozenset({"rope_theta", "rope_scaling", "rope_parameters", "rope_local_base_freq"})
_ROPE_NUMBERS = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
}
"""Kind of scaling -> the parameters it needs."""
_ROPE_OTHERS = frozenset(
    {"factor", "low_freq_factor", "high_freq_factor", "attention_factor", "beta_fast", "beta_slow"}
    | {"short_factor", "long_factor", "mscale", "mscale_all_dim", "truncate", "finetuned"}
)
"""Parameters that transformers reads for some kinds of scaling only, and passes over for the others."""


def rope_from_hf(
    raw: RawConfig, max_length: int, where: str, *, theta: float = 10_000.0, local_theta: float | None = None
) -> Fields:
    """The rotary fields of a `ModelConfig`.

    Args:
        raw: the published config.
        max_length: of the model.
        where: the file, for messages.
        theta: the base, if the config does not give it.
        local_theta: the base of local layers, if the config does not give it; None if they have the same base.

    Raises:
        ValueError: an unsupported scaling, also of local layers; a missing number; fields that disagree.
    """
    parameters = raw.get("rope_parameters") or {}
    if local_theta is None:
        base, scaling = _rope(raw, max_length, where, theta)
        return {"rope_theta": base, "rope_scaling": scaling}
    nested = isinstance(parameters, Mapping) and {"full_attention", "sliding_attention"} & set(parameters)
    full = {**raw, "rope_parameters": parameters.get("full_attention")} if nested else raw
    local = {
        "rope_parameters": parameters.get("sliding_attention") if nested else None,
        "rope_theta": raw.get("rope_local_base_freq"),
    }
    base, scaling = _rope(full, max_length, where, theta)
    local_base, local_scaling = _rope(
        {**local, "rope_theta": raw.get("rope_local_base_freq")}, max_length, where, local_theta
    )
    if local_scaling is not None:
        raise ValueError(f"{where}: the rotary positions of local layers are scaled; that is not supported")
    return {"rope_theta": base, "rope_scaling": scaling, "local_rope_theta": local_base}


def rope_to_hf(config: ModelConfig) -> RawConfig:
    """The fields of a config.json for a model's rotary positions; the inverse of `rope_from_hf`."""
    rope: RawConfig = {"rope_type": "default"}
    raw: RawConfig = {}
    if (scaling := config.rope_scaling) is not None:
        rope = {"rope_type": scaling.kind, "factor": scaling.factor}
        if scaling.kind == "llama3":
            rope |= {
                "low_freq_factor": scaling.low_factor,
                "high_freq_factor": scaling.high_factor,
                "original_max_position_embeddings": scaling.original_length,
            }
        raw["rope_scaling"] = dict(rope)  # read by tools that follow transformers before 5
    raw["rope_theta"] = config.rope_theta
    raw["rope_parameters"] = {"rope_theta": config.rope_theta, **rope}
    if (local := config.local_rope_theta) is not None:
        raw["rope_local_base_freq"] = local
        raw["rope_parameters"] = {
            "full_attention": raw["rope_parameters"],
            "sliding_attention": {"rope_theta": local, "rope_type": "default"},
        }
    return raw


def _rope(raw: RawConfig, max_length: int, where: str, default: float) -> tuple[float, RopeScaling | None]:
    """Rotary base and scaling, from `rope_parameters` or, before transformers 5, `rope_theta` and `rope_scaling`."""
    parameters: RawConfig = {}
    top = {} if raw.get("rope_theta") is None else {"rope_theta": raw["rope_theta"]}
    for place in (top, raw.get("rope_parameters") or {}, raw.get("rope_scaling") or {}):
        if not isinstance(place, Mapping):
            raise ValueError(f"{where}: the rotary parameters are {reprlib.repr(place)}; expected an object")
        for key, value in place.items():
            key = "rope_type" if key == "type" else key
            if value is not None and parameters.setdefault(key, value) != value:
                one, two = reprlib.repr(parameters[key]), reprlib.repr(value)
                raise ValueError(
                    f"{where}: {key} is given as {one} and as {two} (rope_theta, rope_parameters, rope_scaling); keep "
                    "one"
                )
    kind = parameters.pop("rope_type", "default")
    if _is_neutral_yarn(kind, parameters, max_length):
        kind = "default"
    if not isinstance(kind, str) or kind not in _ROPE_NUMBERS:
        raise ValueError(
            f"{where}: rope_type is {reprlib.repr(kind)}; supported are {', '.join(_ROPE_NUMBERS)}. This model's "
            "position encoding cannot be computed faithfully"
        )
    theta = parameters.pop("rope_theta", default)
    original = parameters.pop("original_max_position_embeddings", max_length)
    if parameters.pop("partial_rotary_factor", 1.0) != 1.0:
        raise ValueError(f"{where}: partial_rotary_factor must be 1.0: rotary positions cover the whole head here")
    expected = _ROPE_NUMBERS[kind]
    parameters = {key: value for key, value in parameters.items() if key in expected or key not in _ROPE_OTHERS}
    if set(parameters) != set(expected):
        raise ValueError(
            f"{where}: rope_type {kind} has the parameters {reprlib.repr(sorted(parameters))}; expected exactly "
            f"{list(expected)}"
        )
    for key, value in {**parameters, "rope_theta": theta, "original_max_position_embeddings": original}.items():
        if type(value) not in (int, float) or not 0 < value < math.inf:
            raise ValueError(f"{where}: {key} is {reprlib.repr(value)}; expected a positive number")
    numbers = {key: float(value) for key, value in parameters.items()}
    if numbers.get("factor", 1.0) == 1.0:
        return float(theta), None
    if kind == "linear":
        return float(theta), RopeScaling("linear", numbers["factor"])
    low, high = numbers["low_freq_factor"], numbers["high_freq_factor"]
    if high <= low:
        raise ValueError(f"{where}: high_freq_factor {high} must be above low_freq_factor {low}")
    return float(theta), RopeScaling("llama3", numbers["factor"], low, high, int(original))


def _is_neutral_yarn(kind: object, parameters: Mapping[str, object], max_length: int) -> bool:
    """Whether a scaling by yarn changes nothing: a factor of 1, and nothing that replaces or adds to it."""
    return (
        kind == "yarn"
        and parameters.get("factor") == 1.0
        and parameters.get("attention_factor", 1.0) == 1.0
        and parameters.get("original_max_position_embeddings", max_length) == max_length
    )
