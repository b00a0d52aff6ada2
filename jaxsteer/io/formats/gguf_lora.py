"""LoRA adapters as GGUF files for llama.cpp and Ollama."""

from __future__ import annotations

import math
import reprlib
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from jaxsteer.io.formats.format import Format, Given, Use, WriteOptions
from jaxsteer.io.formats.pieces import base_needed, file_at, finite
from jaxsteer.io.formats.updates import Place, Update, Updates, plan_of, refuse_lora, updates_of
from jaxsteer.io.gguf_file import Gguf, GgufValue, open_gguf
from jaxsteer.io.gguf_write import plain, write_gguf
from jaxsteer.io.load import LoadedModel
from jaxsteer.io.steered import SteeredModel
from jaxsteer.io.stored import names_of, transform_of
from jaxsteer.models.config import ModelConfig
from jaxsteer.models.families import FAMILIES
from jaxsteer.models.families.table import Family, Row
from jaxsteer.types import Plan

FILE = "adapter.gguf"
ALPHA = "adapter.lora.alpha"


class Target(NamedTuple):
    """A projection of one layer within the tensor that holds it.

    outputs  start and stop of the projection's outputs within the tensor's, and how many those are
    """

    place: Place
    row: Row
    outputs: tuple[int, int, int]


def _targets(family: Family, config: ModelConfig) -> dict[str, list[Target]]:
    """The projections in each tensor of a GGUF model that can have a LoRA."""
    targets: dict[str, list[Target]] = {}
    for row in family.parameters(config):
        if not row.path.startswith("blocks/") or not row.path.endswith("/kernel"):
            continue
        site = row.path.removeprefix("blocks/").removesuffix("/kernel").replace("/", ".")
        count = row.shape(config)[-1]
        for layer, name in enumerate(names_of(row, "gguf", config)):
            outputs = row.stored_outputs(config) or (0, count, count)
            targets.setdefault(name, []).append(Target(Place(site, layer), row, outputs))
    return targets


def _open(path: Path) -> Gguf:
    """The adapter at a path.

    Raises:
        ValueError: there is none.
    """
    file = open_gguf(file_at(path, FILE))
    if file.metadata.get("general.type") != "adapter" or file.metadata.get("adapter.type") != "lora":
        raise ValueError(f"{file.path}: general.type and adapter.type are not 'adapter' and 'lora': this is no LoRA")
    return file


def recognises(path: Path) -> bool:
    """Whether this is an adapter in GGUF."""
    try:
        return _open(path) is not None
    except (ValueError, OSError):
        return False


def read(path: Path, loaded: LoadedModel | None, given: Given) -> SteeredModel:
    """The LoRA of a file, or of a folder."""
    file = _open(path)
    loaded = base_needed(file.path, loaded)
    family, config = FAMILIES[loaded.family], loaded.config
    _check_metadata(file, family)
    alpha = file.metadata.get(ALPHA, 0.0)
    if not isinstance(alpha, float) or not math.isfinite(alpha):
        raise ValueError(f"{file.path}: {ALPHA} is {reprlib.repr(alpha)}; expected a number")
    targets, updates = _targets(family, config), Updates()
    for name in _pairs(file, targets):
        first = targets[name][0]
        a, b = (file.tensors[f"{name}.lora_{part}"] for part in "ab")
        inputs, outputs = first.row.shape(config)[0], first.outputs[2]
        if len(a.shape) != 2 or a.shape[1] != inputs or b.shape != (outputs, a.shape[0]):
            raise ValueError(
                f"{file.path}: {name}.lora_a and lora_b have shapes {list(a.shape)} and {list(b.shape)}; expected "
                f"[rank, {inputs}] and [{outputs}, rank]. Give the model that it is for (--model)"
            )
        read_a, read_b = (
            finite(file.path, f"{name}.lora_{part}", np.asarray(tensor.read(), np.float32))
            for part, tensor in (("a", a), ("b", b))
        )
        updates |= _split(read_a, read_b, alpha, targets[name], config)
    plan, steering = plan_of(updates, config)
    return SteeredModel(loaded, plan, steering)


def _check_metadata(file: Gguf, family: Family) -> None:
    """Raise a ValueError for an adapter of another architecture, or one that is more than a LoRA."""
    architecture = file.metadata.get("general.architecture")
    if architecture != family.gguf:
        raise ValueError(
            f"{file.path}: general.architecture is {reprlib.repr(architecture)}, the model's is {family.gguf!r}; give "
            "the model that it is for (--model)"
        )
    known = {"adapter.type", ALPHA, "adapter.lora.task_name", "adapter.lora.prompt_prefix"}
    if unknown := [key for key in file.metadata if key.startswith("adapter.") and key not in known]:
        raise ValueError(f"{file.path}: {', '.join(unknown)}: this adapter acts in a way that is not known here")


def _pairs(file: Gguf, targets: dict[str, list[Target]]) -> list[str]:
    """The tensors of the model for which the file has both factors, in the model's order."""
    expected = {f"{name}.lora_{part}" for name in targets for part in "ab"}
    if unknown := [name for name in file.tensors if name not in expected]:
        raise ValueError(f"{file.path}: {reprlib.repr(unknown[0])} is no factor of a projection of this model")
    names = [name for name in targets if f"{name}.lora_a" in file.tensors or f"{name}.lora_b" in file.tensors]
    if missing := [f"{n}.lora_{p}" for n in names for p in "ab" if f"{n}.lora_{p}" not in file.tensors]:
        raise ValueError(f"{file.path}: {missing[0]} is missing; a LoRA has both factors")
    if not names:
        raise ValueError(f"{file.path}: has no factors")
    return names


def _split(a: np.ndarray, b: np.ndarray, alpha: float, targets: list[Target], config: ModelConfig) -> Updates:
    """The updates of the projections that share a tensor, each with the ranks that act on it."""
    scale = alpha / len(a) if alpha else 1.0
    updates = {}
    for place, row, (start, stop, _) in targets:
        part = Update(a, np.ascontiguousarray(transform_of(row, "gguf").read(b[start:stop], config).T), scale)
        part = _acting(part) if len(targets) > 1 else part
        if part.rank:
            updates[place] = part
    return updates


def _joined(updates: Updates, targets: list[Target], config: ModelConfig) -> Update | None:
    """The update of a tensor from those of the projections that share it, with B as it is stored."""
    shared = len(targets) > 1
    parts = [
        (target, _acting(updates[target.place]) if shared else updates[target.place])
        for target in targets
        if target.place in updates
    ]
    parts = [(target, update) for target, update in parts if update.rank]
    if not parts:
        return None
    same = len({update.scale for _, update in parts}) == 1
    b = np.zeros((targets[0].outputs[2], sum(update.rank for _, update in parts)), np.float32)
    at = 0
    for (_, row, (start, stop, _)), update in parts:
        stored = transform_of(row, "gguf").write(np.asarray(update.b, np.float32).T, config)
        b[start:stop, at : at + update.rank] = stored if same else stored * np.float32(update.scale)
        at += update.rank
    a = np.concatenate([np.asarray(update.a, np.float32) for _, update in parts])
    return Update(a, b, parts[0][1].scale if same else 1.0)


def _acting(update: Update) -> Update:
    """The update without the ranks that B gives no effect."""
    acts = update.b.any(axis=0)
    return update if acts.all() else Update(update.a[acts], np.ascontiguousarray(update.b[:, acts]), update.scale)


def _stored(steered: SteeredModel) -> tuple[dict[str, Update], float]:
    """The updates by the names of their tensors as the file holds them, and its alpha.

    A file has one alpha, which is divided by each tensor's rank: the most frequent one, so that most factors stay as
    they are. What a scale differs by goes into B.
    """
    config, family = steered.loaded.config, FAMILIES[steered.loaded.family]
    updates = updates_of(steered)
    joined = {name: _joined(updates, at, config) for name, at in _targets(family, config).items()}
    alpha_of = lambda update: float(np.float32(update.scale * update.rank))
    counts = Counter(alpha_of(update) for update in joined.values() if update is not None and update.scale)
    alpha = counts.most_common(1)[0][0] if counts else 1.0
    stored = {}
    for name, update in joined.items():
        if update is not None:
            own = alpha_of(update)
            b = update.b if own == alpha else update.b * np.float32(update.scale * update.rank / alpha)
            stored[name] = Update(update.a, np.asarray(b, np.float32), alpha / update.rank)
    return stored, alpha


def refuse(plan: Plan, family: Family, config: ModelConfig, options: WriteOptions) -> list[str]:
    """Why a plan is no LoRA."""
    reasons = [] if plan else ["there is no steering to write"]
    return reasons + refuse_lora(plan, config, dora=False)


def reduce(steered: SteeredModel, options: WriteOptions) -> SteeredModel:
    """The plan as LoRA slots whose scales follow from the file's one alpha."""
    config, family = steered.loaded.config, FAMILIES[steered.loaded.family]
    stored, alpha = _stored(steered)
    targets, updates = _targets(family, config), Updates()
    for name, update in stored.items():
        updates |= _split(update.a, update.b, alpha, targets[name], config)
    plan, steering = plan_of(updates, config)
    return replace(steered, plan=plan, steering=steering)


def write(reduced: SteeredModel, folder: Path, options: WriteOptions) -> None:
    """Write adapter.gguf."""
    stored, alpha = _stored(reduced)
    metadata: dict[str, GgufValue] = {
        "general.architecture": FAMILIES[reduced.loaded.family].gguf,
        "general.type": "adapter",
        "general.name": options.name,
        "adapter.type": "lora",
        ALPHA: alpha,
    }
    tensors = [
        plain(f"{name}.lora_{part}", factor)
        for name, update in stored.items()
        for part, factor in (("a", update.a), ("b", update.b))
    ]
    write_gguf(folder / FILE, metadata, tensors)


FORMAT = Format(
    name="gguf-lora",
    holds="LoRA, and steering that becomes LoRA",
    programs="llama.cpp, Ollama",
    recognises=recognises,
    read=read,
    refuse=refuse,
    reduce=reduce,
    write=write,
    options=("name",),
    verify="llama",
    over="gguf",
    use=Use(
        "gguf",
        "adapter",
        'llama-cli -m MODEL.gguf --lora FOLDER/adapter.gguf -p "Hello"',
        "bash",
        tags=("gguf", "lora"),
        needs="`MODEL.gguf` is the base model in GGUF.",
    ),
)
