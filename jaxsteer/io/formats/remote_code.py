"""Folders of a model with steering after its blocks, which transformers and vLLM load with trust_remote_code.

The code is a template, filled with names of classes from our own tables: nothing of a person's files enters it. What
it needs to know of the steering is in config.json under `jaxsteer`. The folder's `model_type` is its own, so that
loading without trust fails instead of giving the model without its steering.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from jaxsteer.io.files import Json, read_json
from jaxsteer.io.hf_folder import Extras
from jaxsteer.io.load import STEERED_TYPE, LoadedModel, load_parts, open_folder
from jaxsteer.io.safetensors_file import ToWrite
from jaxsteer.io.steered import SteeredModel
from jaxsteer.io.stored import Stored
from jaxsteer.models.families import FAMILIES, families_of
from jaxsteer.models.families.table import Family, RawConfig
from jaxsteer.steering import param_specs
from jaxsteer.types import Array, Plan, Steering

KEY = "jaxsteer"
"""The field of config.json that describes the steering."""

MODULE = "modeling_jaxsteer"

_NAMED = 5
"""Number of tensors that a message names."""


def classes_of(family: Family) -> dict[str, str]:
    """The names of a family's module and classes in transformers, and the stem that they share."""
    stem = family.hf_class.removesuffix("ForCausalLM").removesuffix("LMHeadModel")
    return {
        "stem": stem,
        "module": family.name,
        "config": f"{stem}Config",
        "block": f"{stem}DecoderLayer",
        "backbone": f"{stem}Model",
        "head": family.hf_class,
    } | dict(family.hf_classes)


def blocks_of(family: Family) -> str:
    """The path of the list of blocks in the names of tensors, such as "model.layers"."""
    return next(row.hf.partition(".{i}.")[0] for row in family.rows if row.stacked)


NameOf = Callable[[int, str], str]
"""(number of a slot in the plan, parameter) -> the tensor's name within a block."""


def extras_of(
    kind: str, steered: SteeredModel, about: Mapping[str, Json], name_of: NameOf, keep: Sequence[str] = ()
) -> Extras:
    """What such a folder holds besides the base model.

    Args:
        kind: of folder, which is the name of its template: "steered" or "steerable".
        steered: the base model, and slots @ block.
        about: what the code and our reader need to know.
        name_of: of the tensors.
        keep: modules whose parameters stay in fp32, whatever the dtype of the base.
    """
    family = FAMILIES[steered.loaded.family]
    names = classes_of(family) | {
        "model_type": STEERED_TYPE + family.hf_type,
        "blocks": blocks_of(family).rpartition(".")[2],
        "keep": str(list(keep)).replace("'", '"'),
        "steering": _template(kind).rstrip("\n"),
    }
    prefix = f"Jaxsteer{names['stem']}"
    auto = {"AutoConfig": "Config", "AutoModel": "Model", "AutoModelForCausalLM": "ForCausalLM"}
    fields = {
        "architectures": [f"{prefix}ForCausalLM"],
        "model_type": names["model_type"],
        "auto_map": {name: f"{MODULE}.{prefix}{ending}" for name, ending in auto.items()},
        KEY: {"kind": kind, **about},
    }
    tensors = _tensors(steered, blocks_of(family), name_of)
    return Extras(tensors, fields, {f"{MODULE}.py": Template(_template("model")).substitute(names)})


def _tensors(steered: SteeredModel, blocks: str, name_of: NameOf) -> list[ToWrite]:
    """The tensors of steering @ block, one for each parameter and layer."""
    tensors = []
    for number, slot in enumerate(steered.plan):
        layers = slot.active_layers(steered.loaded.config.layers)
        for param, leaf in steered.steering[slot.name]["block"].items():
            value = np.asarray(leaf)
            for at, layer in enumerate(layers):
                name = f"{blocks}.{layer}.{name_of(number, param)}"
                tensors.append(ToWrite(name, value.shape[1:], value.dtype, partial(value.__getitem__, at)))
    return tensors


def _template(name: str) -> str:
    """A template's text. The files are no .py files: this library does not import torch."""
    return (files("jaxsteer.io.formats") / "templates" / f"{name}.txt").read_text()


class Parts(NamedTuple):
    """The parts of such a folder.

    loaded   the base model
    about    what config.json says of the steering, unchecked
    tensors  of the steering by (block, name within the block)
    """

    loaded: LoadedModel
    about: dict[str, Json]
    tensors: dict[tuple[int, str], Stored]


def is_folder(path: Path, kind: str) -> bool:
    """Whether this is such a folder, of this kind."""
    try:
        about = read_json(path / "config.json").get(KEY)
    except (ValueError, OSError):
        return False
    return isinstance(about, dict) and about.get("kind") == kind


class Described(NamedTuple):
    """What the config.json of such a folder says.

    family  of the base model
    raw     the fields of the base model
    about   of the steering, unchecked
    """

    family: Family
    raw: RawConfig
    about: dict[str, Json]


def describe_folder(path: Path, kind: str) -> Described:
    """Read the config.json of such a folder.

    Raises:
        ValueError: it is damaged, or of another kind.
    """
    file = path / "config.json"
    raw = read_json(file)
    about, name = raw.pop(KEY, None), raw.pop("model_type", None)
    if not isinstance(about, dict) or about.get("kind") != kind or not str(name).startswith(STEERED_TYPE):
        raise ValueError(f"{file}: not that of a {kind} model of jaxsteer's")
    raw["model_type"] = str(name).removeprefix(STEERED_TYPE)
    (family,) = families_of("hf_type", raw["model_type"], str(file))
    return Described(family, raw, about)


def tensors_of(path: Path, family: Family) -> tuple[dict[str, Stored], dict[tuple[int, str], Stored]]:
    """The tensors of such a folder: the base model's, and the steering's by (block, name within the block)."""
    pattern = re.compile(re.escape(blocks_of(family)) + r"\.([0-9]{1,6})\.(steer(?:ing|_up|_down)\..+)")
    base, steering = {}, {}
    for tensor, stored in open_folder(path).items():
        if found := pattern.fullmatch(tensor):
            steering[int(found[1]), found[2]] = stored
        else:
            base[tensor] = stored
    return base, steering


def read_folder(path: Path, kind: str) -> Parts:
    """Read such a folder, as we wrote it or as transformers saved it again; its code is not read.

    Raises:
        ValueError: it is damaged, or of another kind.
    """
    family, raw, about = describe_folder(path, kind)
    base, steering = tensors_of(path, family)
    return Parts(load_parts(path, raw, base), about, steering)


def steering_of(parts: Parts, plan: Plan, name_of: NameOf, where: str) -> Steering:
    """Read the steering of a plan, whose slots are all @ block.

    Raises:
        ValueError: tensors that are missing, unknown or of the wrong shape, all named.
    """
    config = parts.loaded.config
    expected: dict[tuple[int, str], tuple[int, ...]] = {}
    specs = param_specs(plan, config)
    for number, slot in enumerate(plan):
        for param, spec in specs[slot.name]["block"].items():
            name = name_of(number, param)
            expected |= {(layer, name): spec.shape for layer in slot.active_layers(config.layers)}
    found = {place: tensor.shape for place, tensor in parts.tensors.items()}
    if wrong := sorted(place for place in expected | found if expected.get(place) != found.get(place)):
        named = ", ".join(f"block {layer}'s {name}" for layer, name in wrong[:_NAMED])
        raise ValueError(f"{where}: missing, not in the plan, or of another shape: {named}; copy the folder again")

    def leaf(name: str, layers: Sequence[int]) -> Array:
        values = [parts.tensors[layer, name].read() for layer in layers]
        dtypes = {value.dtype for value in values}
        return jnp.asarray(np.stack(values, dtype=dtypes.pop() if len(dtypes) == 1 else np.float32))

    return {
        slot.name: {
            "block": {
                param: leaf(name_of(number, param), slot.active_layers(config.layers))
                for param in specs[slot.name]["block"]
            }
        }
        for number, slot in enumerate(plan)
    }
