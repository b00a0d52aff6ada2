"""Control vectors for llama.cpp, and those of repeng: one vector for each block from 1 on, added to its output."""

from __future__ import annotations

import math
import re
import reprlib
from dataclasses import replace
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from jaxsteer.folding import affine_parts
from jaxsteer.interventions import FixedVector
from jaxsteer.io.formats.format import Format, Given, Use, WriteOptions
from jaxsteer.io.formats.pieces import file_at, finite
from jaxsteer.io.gguf_file import Gguf, GgufValue, open_gguf
from jaxsteer.io.gguf_write import plain, write_gguf
from jaxsteer.io.load import LoadedModel
from jaxsteer.io.steered import SteeredModel
from jaxsteer.models.config import ModelConfig
from jaxsteer.models.families import FAMILIES
from jaxsteer.models.families.table import Family
from jaxsteer.plans import method_name
from jaxsteer.types import Plan, Slot

FILE = "control.gguf"
ARCHITECTURE = "controlvector"

STRENGTH = "controlvector.strength"
"""Factor for which the vectors of a file are meant, in files of ours; llama.cpp, which ignores it, scales by 1 too."""

AFTER_BLOCK = ("block", "mlp")
"""Sites whose shift comes out of the block as it is."""


def _open(path: Path) -> Gguf | None:
    """The control vector at a path; None if there is none."""
    try:
        file = open_gguf(file_at(path, FILE))
    except (ValueError, OSError):
        return None
    return file if file.metadata.get("general.architecture") == ARCHITECTURE else None


def recognises(path: Path) -> bool:
    """Whether this is a control vector that says its strength."""
    file = _open(path)
    return file is not None and STRENGTH in file.metadata


def recognises_repeng(path: Path) -> bool:
    """Whether this is any control vector."""
    return _open(path) is not None


def read(path: Path, loaded: LoadedModel | None, given: Given) -> SteeredModel:
    """The vectors, each times the strength that is given, or the file's own."""
    file = open_gguf(file_at(path, FILE))
    strength = file.metadata.get(STRENGTH) if given.strength is None else given.strength
    missing = [] if loaded is not None else ["which model it is for: --model"]
    if strength is None:
        missing.append("the factor of its vectors: --strength")
    if missing:
        raise ValueError(f"{file.path}: does not say {', nor '.join(missing)}")
    if not isinstance(strength, int | float) or not math.isfinite(strength):
        raise ValueError(f"{file.path}: the strength is {reprlib.repr(strength)}; expected a number (--strength)")
    assert loaded is not None
    _check(file, loaded)
    with np.errstate(over="ignore"):
        vectors = {
            _block_of(name): finite(file.path, name, np.asarray(tensor.read(), np.float32) * np.float32(strength))
            for name, tensor in file.tensors.items()
        }
    return _with_vectors(SteeredModel(loaded), vectors)


def _check(file: Gguf, loaded: LoadedModel) -> None:
    """Raise a ValueError unless the file has vectors for blocks of this model, and nothing else."""
    config, where = loaded.config, str(file.path)
    if file.metadata.get("general.architecture") != ARCHITECTURE:
        raise ValueError(f"{where}: general.architecture is not {ARCHITECTURE!r}: this is no control vector")
    hint, ours = file.metadata.get("controlvector.model_hint"), FAMILIES[loaded.family].gguf
    others = {family.gguf for family in FAMILIES.values() if hint in (family.hf_type, family.gguf)}
    if others and ours not in others:
        raise ValueError(f"{where}: its vectors are for a model of type {hint!r}, {loaded.name} is {loaded.family}")
    if not file.tensors:
        raise ValueError(f"{where}: has no vectors")
    for name, tensor in file.tensors.items():
        if not 0 <= _block_of(name) < config.layers:
            raise ValueError(
                f"{where}: {reprlib.repr(name)} is no direction of a block of this model; expected direction.1 to "
                f"direction.{config.layers - 1}"
            )
        if tensor.shape != (config.width,):
            raise ValueError(
                f"{where}: {name} has shape {list(tensor.shape)}, the model's width is {config.width}; give the model "
                "that it is for (--model)"
            )
    if len({_block_of(name) for name in file.tensors}) < len(file.tensors):
        raise ValueError(f"{where}: has two directions of one block")


def _block_of(name: str) -> int:
    """The 0-based block of a direction; -1 if it is none."""
    found = re.fullmatch(r"direction\.([0-9]{1,6})", name)
    return int(found[1]) if found else -1


def _with_vectors(steered: SteeredModel, vectors: dict[int, np.ndarray]) -> SteeredModel:
    """The model steered by these vectors after blocks."""
    blocks = tuple(sorted(vectors))
    layers = None if blocks == tuple(range(steered.loaded.config.layers)) else blocks
    plan = (Slot("control", FixedVector(), ("block",), layers),)
    stacked = jnp.asarray(np.stack([vectors[i] for i in blocks]), jnp.float32)
    return replace(steered, plan=plan, steering={"control": {"block": {"v": stacked}}})


def refuse(plan: Plan, family: Family, config: ModelConfig, options: WriteOptions) -> list[str]:
    """Why a plan is no control vector, a sentence for each slot."""
    reasons = [] if plan else ["there is no steering to write: a control vector holds fixed vectors after blocks"]
    for slot in plan:
        what = f"slot {slot.name!r} ({method_name(slot.method)} @ {','.join(slot.sites)})"
        parts = affine_parts(slot, config) if slot.method.kind == "activation" else None
        if not set(slot.sites) <= set(AFTER_BLOCK):
            reasons.append(f"{what}: a control vector holds vectors after blocks only; merge it (--to gguf)")
        elif slot.positions.kind != "all":
            reasons.append(
                f"{what}: steers positions {slot.positions}; a control vector steers all. Use jaxsteer itself"
            )
        elif parts is None or parts.read is not None or parts.scale is not None:
            reasons.append(f"{what}: its shift is no fixed vector. Use --to hf-steered, or for LoRA --to gguf-lora")
        elif 0 in slot.active_layers(config.layers):
            reasons.append(
                f"{what}: llama.cpp has no control vector for layer 0; leave that layer out of the plan, or merge the "
                "vectors into biases (--to gguf)"
            )
    return reasons


def reduce(steered: SteeredModel, options: WriteOptions) -> SteeredModel:
    """The sum of all vectors after each block, as one slot."""
    vectors: dict[int, np.ndarray] = {}
    for slot in steered.plan:
        for site in slot.sites:
            for at, block in enumerate(slot.active_layers(steered.loaded.config.layers)):
                delta = slot.method.affine({name: leaf[at] for name, leaf in steered.steering[slot.name][site].items()})
                assert delta is not None
                shift = np.asarray(delta.shift, np.float32)
                vectors[block] = vectors[block] + shift if block in vectors else shift
    return _with_vectors(steered, vectors)


def write(reduced: SteeredModel, folder: Path, options: WriteOptions) -> None:
    """Write control.gguf."""
    (slot,) = reduced.plan
    blocks = slot.active_layers(reduced.loaded.config.layers)
    vectors = np.asarray(reduced.steering[slot.name]["block"]["v"])
    metadata: dict[str, GgufValue] = {
        "general.architecture": ARCHITECTURE,
        "general.name": options.name,
        "controlvector.model_hint": FAMILIES[reduced.loaded.family].hf_type,
        "controlvector.layer_count": len(blocks),
        STRENGTH: 1.0,
    }
    tensors = [plain(f"direction.{i}", vector) for i, vector in zip(blocks, vectors, strict=True)]
    write_gguf(folder / FILE, metadata, tensors)


FORMAT = Format(
    name="gguf-control",
    holds="fixed vectors after blocks from 1 on",
    programs="llama.cpp",
    recognises=recognises,
    read=read,
    refuse=refuse,
    reduce=reduce,
    write=write,
    options=("name",),
    asks=("strength",),
    verify="llama",
    over="gguf",
    use=Use(
        "gguf",
        "adapter",
        'llama-cli -m MODEL.gguf --control-vector FOLDER/control.gguf -p "Hello"',
        "bash",
        tags=("gguf", "control-vector"),
        needs="`MODEL.gguf` is the base model in GGUF.",
    ),
)

REPENG = Format(
    name="repeng",
    holds="fixed vectors after blocks, without their strength",
    programs="repeng, llama-cvector-generator",
    recognises=recognises_repeng,
    read=read,
    asks=("strength",),
)
