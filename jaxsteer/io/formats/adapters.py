"""Bottleneck folders of AdapterHub's `adapters`: nonlinear and linear steering after blocks, on Llama and Mistral."""

from __future__ import annotations

import math
import reprlib
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np

from jaxsteer.io.files import Json, read_json, write_json
from jaxsteer.io.formats.format import Format, Given, Use, WriteOptions
from jaxsteer.io.formats.peft import tensors_of
from jaxsteer.io.formats.pieces import (
    LowRank,
    Piece,
    activation_of,
    base_named_in,
    base_needed,
    gather,
    low_rank,
    values,
)
from jaxsteer.io.load import LoadedModel
from jaxsteer.io.safetensors_file import ToWrite, write_safetensors
from jaxsteer.io.source import hub_id
from jaxsteer.io.steered import SteeredModel
from jaxsteer.models.config import ModelConfig
from jaxsteer.models.families import FAMILIES
from jaxsteer.models.families.table import Family
from jaxsteer.plans import method_name
from jaxsteer.types import Plan

CONFIG, WEIGHTS, PICKLED = "adapter_config.json", "adapter.safetensors", "pytorch_adapter.bin"
FAMILIES_THERE = ("llama", "mistral")
"""Families whose blocks `adapters` changes where our site is."""
VERSION = "adapters.1.3.0"
"""Whose files ours are like."""
_ACTIVATIONS = {"silu": "silu", "swish": "silu", "relu": "relu", "gelu": "gelu", "tanh": "tanh", "linear": "none"}
"""Their name -> ours."""
_RESIDUALS = ((True, False, False), (True, True, True))
"""original_ln_before, original_ln_after and residual_before_ln of y + shift(y) after the block, in models whose norms
come first."""
_FIXED: dict[str, Json] = {
    **dict.fromkeys(("mh_adapter", "ln_before", "ln_after", "is_parallel", "use_gating", "cross_adapter"), False),
    **{"phm_layer": False, "output_adapter": True, "inv_adapter": None},
}
_HARMLESS = frozenset(
    {"dropout", "stochastic_depth", "init_weights", "init_weights_seed", "adapter_residual_before_ln", "phm_dim"}
    | {"inv_adapter_reduction_factor", "factorized_phm_W", "shared_W_phm", "shared_phm_rule", "factorized_phm_rule"}
    | {"phm_c_init", "phm_init_range", "learn_phm", "hypercomplex_nonlinearity", "phm_rank", "phm_bias"}
)
"""Settings of training, and of parts that are not used."""
_PARTS = {"D": "adapter_down.0.weight", "U": "adapter_up.weight"}
_BIASES = ("adapter_down.0.bias", "adapter_up.bias")


def recognises(path: Path) -> bool:
    """Whether a folder has the files of `adapters`."""
    return (path / CONFIG).is_file() and ((path / WEIGHTS).is_file() or (path / PICKLED).is_file())


def refuse(plan: Plan, family: Family, config: ModelConfig, options: WriteOptions) -> list[str]:
    """Why a plan is no bottleneck adapter after the blocks."""
    reasons = []
    if family.name not in FAMILIES_THERE:
        reasons.append(
            f"{family.name}: only blocks of {' and '.join(FAMILIES_THERE)} can be steered there. Use --to hf-steered"
        )
    if len(plan) != 1:
        reasons.append(f"one adapter holds one slot; the plan has {len(plan)}. Use --to hf-steered")
    for slot in plan:
        what = f"slot {slot.name!r} ({method_name(slot.method)} @ {','.join(slot.sites)})"
        if not isinstance(slot.method, LowRank) or slot.sites != ("block",):
            reasons.append(
                f"{what}: only nonlinear and linear steering after the block can be held. Use --to hf-steered"
            )
        elif slot.positions.kind != "all":
            reasons.append(f"{what}: steers positions {slot.positions}; an adapter steers all. Use jaxsteer itself")
        elif factor_for(slot.method.rank, config.width) is None:
            reasons.append(f"{what}: no reduction factor of width {config.width} gives rank {slot.method.rank}")
    return reasons


def factor_for(rank: int, width: int) -> float | None:
    """The reduction factor from which `adapters` computes a rank, int(width // factor); None if there is none."""
    near = width / rank
    return next((f for f in (near, math.nextafter(near, 0)) if int(width // f) == rank), None)


def write(reduced: SteeredModel, folder: Path, options: WriteOptions) -> None:
    """Write the two files."""
    (slot,), config = reduced.plan, reduced.loaded.config
    assert isinstance(slot.method, LowRank)
    layers = slot.active_layers(config.layers)
    ours = activation_of(slot.method)
    bottleneck = {
        **_FIXED,
        "reduction_factor": factor_for(slot.method.rank, config.width),
        "non_linearity": next(theirs for theirs, name in _ACTIVATIONS.items() if name == ours),
        **dict(zip(("original_ln_before", "original_ln_after", "residual_before_ln"), _RESIDUALS[0], strict=True)),
        "scaling": float(slot.method.alpha),
        "leave_out": [layer for layer in range(config.layers) if layer not in layers],
    }
    tensors = []
    for at, layer in enumerate(layers):
        leaves = {name: np.asarray(leaf[at]) for name, leaf in reduced.steering[slot.name]["block"].items()}
        values = {part: leaves[name] for name, part in _PARTS.items()}
        values |= {
            bias: np.zeros(value.shape[0], value.dtype) for bias, value in zip(_BIASES, values.values(), strict=True)
        }
        tensors += [ToWrite.of(f"{_prefix(layer, options.name)}{part}", value) for part, value in values.items()]
    write_safetensors(folder / WEIGHTS, tensors, {"format": "pt"})
    family = FAMILIES[reduced.loaded.family]
    said = {"model_type": family.hf_type, "model_class": family.hf_class, "hidden_size": config.width}
    said |= {"name": options.name, "model_name": hub_id(reduced.source), "version": VERSION}
    write_json(folder / CONFIG, said | {"config": bottleneck})


def reduce(steered: SteeredModel, options: WriteOptions) -> SteeredModel:
    """The same as it will be read."""
    (slot,), count = steered.plan, steered.loaded.config.layers
    assert isinstance(slot.method, LowRank)
    method = low_rank(slot.method.rank, activation_of(slot.method), slot.method.alpha)
    layers = None if len(slot.active_layers(count)) == count else slot.layers
    name = method_name(method)
    plan = (replace(slot, name=name, method=method, layers=layers),)
    return replace(steered, plan=plan, steering={name: steered.steering[slot.name]})


def _prefix(layer: int, name: str) -> str:
    """What the names of one layer's tensors begin with."""
    return f"model.layers.{layer}.output_adapters.adapters.{name}."


def read(path: Path, loaded: LoadedModel | None, given: Given) -> SteeredModel:
    """Read a folder; the plan has a slot for each rank."""
    file = path / CONFIG
    raw = read_json(file)
    loaded = base_needed(path, loaded)
    config, said = loaded.config, raw.get("config") or {}
    problems = _problems(raw, loaded) or _config_problems(said)
    if problems:
        raise ValueError(f"{file}: {'; '.join(problems)}")
    layers = [layer for layer in range(config.layers) if layer not in (said.get("leave_out") or [])]
    ranks = {layer: _rank(str(file), said["reduction_factor"], layer, config.width) for layer in layers}
    activation, alpha = _ACTIVATIONS[said["non_linearity"].lower()], said.get("scaling", 1.0)
    parts = _read_tensors(path, raw["name"], ranks, config.width)
    return gather(path, loaded, [Piece(low_rank(ranks[i], activation, alpha), "block", i, parts[i]) for i in layers])


def _problems(raw: Mapping[str, Json], loaded: LoadedModel) -> list[str]:
    """Why a config is not of this model, or of no adapter."""
    family, width = FAMILIES[loaded.family], loaded.config.width
    problems = []
    if family.name not in FAMILIES_THERE:
        problems.append(f"the model is {family.name}; supported are {' and '.join(FAMILIES_THERE)}")
    for field, expected in (("model_type", family.hf_type), ("hidden_size", width)):
        if raw.get(field) != expected:
            problems.append(f"{field} is {reprlib.repr(raw.get(field))}, the model's is {expected!r}")
    if not isinstance(raw.get("name"), str) or not isinstance(raw.get("version"), str):
        problems.append("name and version must be texts, as in every adapter since 2021")
    if not isinstance(raw.get("config"), dict):
        problems.append("has no object `config` with the adapter's settings")
    return problems


def _config_problems(said: Mapping[str, Json]) -> list[str]:
    """What of a bottleneck's settings is not steering after the block."""
    problems = [
        f"{field} is {reprlib.repr(said[field])}, supported is {value}"
        for field, value in _FIXED.items()
        if said.get(field, value) != value
    ]
    residual = tuple(said.get(f) for f in ("original_ln_before", "original_ln_after", "residual_before_ln"))
    if residual not in _RESIDUALS:
        problems.append(
            "original_ln_before, original_ln_after and residual_before_ln are "
            f"{reprlib.repr(residual)}; supported are {' and '.join(map(str, _RESIDUALS))}: after the block"
        )
    checks: dict[str, tuple[Callable[[Json], bool], str]] = {
        "scaling": (lambda v: type(v) is float and math.isfinite(v), "a number with a decimal point"),
        "non_linearity": (
            lambda v: isinstance(v, str) and v.lower() in _ACTIVATIONS,
            f"one of {', '.join(_ACTIVATIONS)}",
        ),
        "leave_out": (
            lambda v: v is None or (isinstance(v, list) and all(type(i) is int for i in v)),
            "a list of layers",
        ),
        "reduction_factor": (_is_factor, "a number above 0, or an object of them"),
    }
    fallback = {"scaling": 1.0, "leave_out": []}
    for field, (check, allowed) in checks.items():
        if not check(said.get(field, fallback.get(field))):
            problems.append(f"{field} is {reprlib.repr(said.get(field))}; expected {allowed}")
    known = {*_FIXED, *_HARMLESS, *checks, "original_ln_before", "original_ln_after", "residual_before_ln"}
    problems += [f"{field} is not supported" for field, value in said.items() if field not in known and value]
    return problems


def _is_factor(value: Json) -> bool:
    """Whether a value is a reduction factor, or one for each layer."""
    values = value.values() if isinstance(value, dict) else [value]
    return all(type(v) in (int, float) and 0 < v < 2**31 for v in values)


def _rank(where: str, factor: Json, layer: int, width: int) -> int:
    """The rank in a layer, as `adapters` computes it."""
    if isinstance(factor, dict):
        factor = factor.get(str(layer), factor.get("default"))
    if factor is None:
        raise ValueError(f"{where}: reduction_factor has nothing for layer {layer}, and no default")
    rank = width // factor
    if not rank <= width:
        raise ValueError(f"{where}: a reduction_factor of {factor} gives rank {rank:g}, above the width {width}")
    return max(int(rank), 1)


def _read_tensors(path: Path, name: str, ranks: Mapping[int, int], width: int) -> dict[int, dict[str, np.ndarray]]:
    """D and U of each layer, fp32."""
    file, tensors = tensors_of(path, WEIGHTS, PICKLED)
    # Saved without its head, a model's names begin within it.
    tensors = {key if key.startswith("model.") else f"model.{key}": tensor for key, tensor in tensors.items()}
    expected = {f"{_prefix(layer, name)}{part}" for layer in ranks for part in (*_PARTS.values(), *_BIASES)}
    if wrong := sorted(expected ^ set(tensors)):
        what = "; ".join(f"{'has no' if key in expected else 'has the unknown'} {key}" for key in wrong[:5])
        raise ValueError(f"{file}: {what}{' and others' if len(wrong) > 5 else ''}")
    leaves = {}
    for layer, rank in ranks.items():
        shapes = dict(zip((*_PARTS.values(), *_BIASES), ((rank, width), (width, rank), (rank,), (width,)), strict=True))
        read = {
            part: values(file, key, tensors[key], shape).astype(np.float32)
            for part, shape in shapes.items()
            if (key := f"{_prefix(layer, name)}{part}")
        }
        if any(read[bias].any() for bias in _BIASES):
            raise ValueError(f"{file}: layer {layer} has biases other than zero, which steering here does not have")
        leaves[layer] = {ours: read[part] for ours, part in _PARTS.items()}
    return leaves


FORMAT = Format(
    name="adapters",
    holds="nonlinear or linear steering after the blocks, Llama and Mistral",
    programs="adapters (AdapterHub)",
    recognises=recognises,
    read=read,
    base=base_named_in(CONFIG, "model_name"),
    refuse=refuse,
    reduce=reduce,
    write=write,
    options=("name",),
    verify="adapters",
    over="hf",
    use=Use(
        "adapter-transformers",
        "adapter",
        """\
import adapters
from transformers import AutoModelForCausalLM
adapters.init(model := AutoModelForCausalLM.from_pretrained("BASE"))
model.load_adapter("FOLDER", use_safetensors=True, set_active=True)""",
        tags=("adapters",),
    ),
)
