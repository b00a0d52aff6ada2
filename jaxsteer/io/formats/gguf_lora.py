"""LoRA adapters as GGUF files for llama.cpp and Ollama."""

from __future__ import annotations

import math
import reprlib
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np

from jaxsteer.io.formats.format import Format, Given, Use, WriteOptions
from jaxsteer.io.formats.modules import by_module, by_place, modules_of
from jaxsteer.io.formats.pieces import base_needed, file_at, finite
from jaxsteer.io.formats.updates import Update, Updates, plan_of, refuse_lora, updates_of
from jaxsteer.io.gguf_file import Gguf, GgufValue, open_gguf
from jaxsteer.io.gguf_write import plain, write_gguf
from jaxsteer.io.load import LoadedModel
from jaxsteer.io.steered import SteeredModel
from jaxsteer.io.stored import transform_of
from jaxsteer.models.config import ModelConfig
from jaxsteer.models.families import FAMILIES
from jaxsteer.models.families.table import Family, Row
from jaxsteer.types import Plan

FILE = "adapter.gguf"
ALPHA = "adapter.lora.alpha"


def _layers(loaded: LoadedModel) -> dict[str, tuple[int, int]]:
    """The tensors of a GGUF model that can have a LoRA, with their numbers of inputs and outputs."""
    config = loaded.config
    modules = modules_of(FAMILIES[loaded.family], config, "gguf")
    return {module.named(i): module.shape(config) for module in modules for i in range(config.layers)}


def _to_stored(updates: Updates, loaded: LoadedModel) -> dict[str, Update]:
    """Updates by the names of their tensors, B in the order of the tensor's outputs."""
    family, config = FAMILIES[loaded.family], loaded.config
    change = {site: transform_of(row, "gguf") for site, row in _rows(loaded).items()}
    arranged = {place: replace(u, b=change[place.site].write(u.b.T, config)) for place, u in updates.items()}
    return by_module(arranged, family, config, "gguf")


def _from_stored(stored: Mapping[str, Update], loaded: LoadedModel) -> Updates:
    """The inverse of `_to_stored`."""
    family, config = FAMILIES[loaded.family], loaded.config
    change = {site: transform_of(row, "gguf") for site, row in _rows(loaded).items()}
    arranged = by_place(stored, family, config, "gguf")
    b_of = lambda place, u: np.ascontiguousarray(change[place.site].read(u.b, config).T)
    return {place: replace(u, b=b_of(place, u)) for place, u in arranged.items()}


def _rows(loaded: LoadedModel) -> dict[str, Row]:
    """The table's row of each projection's kernel."""
    modules = modules_of(FAMILIES[loaded.family], loaded.config, "gguf")
    return {site: row for module in modules for site, row in module.rows.items()}


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
    _check_metadata(file, FAMILIES[loaded.family])
    alpha = file.metadata.get(ALPHA, 0.0)
    if not isinstance(alpha, float) or not math.isfinite(alpha):
        raise ValueError(f"{file.path}: {ALPHA} is {reprlib.repr(alpha)}; expected a number")
    layers, stored = _layers(loaded), dict[str, Update]()
    for name in _pairs(file, layers):
        a, b = (file.tensors[f"{name}.weight.lora_{part}"] for part in "ab")
        inputs, outputs = layers[name]
        if len(a.shape) != 2 or a.shape[1] != inputs or b.shape != (outputs, a.shape[0]):
            raise ValueError(
                f"{file.path}: {name}.weight.lora_a and lora_b have shapes {list(a.shape)} and {list(b.shape)}; "
                f"expected [rank, {inputs}] and [{outputs}, rank]. Give the model that it is for (--model)"
            )
        read_a, read_b = (
            finite(file.path, f"{name}.weight.lora_{part}", np.asarray(tensor.read(), np.float32))
            for part, tensor in (("a", a), ("b", b))
        )
        stored[name] = Update(read_a, read_b, alpha / len(read_a) if alpha else 1.0)
    plan, steering = plan_of(_from_stored(stored, loaded), loaded.config)
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


def _pairs(file: Gguf, layers: Collection[str]) -> list[str]:
    """The tensors of the model for which the file has both factors, in the model's order."""
    factor = lambda name, part: f"{name}.weight.lora_{part}"
    expected = {factor(name, part) for name in layers for part in "ab"}
    if unknown := [name for name in file.tensors if name not in expected]:
        raise ValueError(f"{file.path}: {reprlib.repr(unknown[0])} is no factor of a projection of this model")
    names = [name for name in layers if any(factor(name, part) in file.tensors for part in "ab")]
    if missing := [factor(name, part) for name in names for part in "ab" if factor(name, part) not in file.tensors]:
        raise ValueError(f"{file.path}: {missing[0]} is missing; a LoRA has both factors")
    if not names:
        raise ValueError(f"{file.path}: has no factors")
    return names


def _with_one_alpha(stored: Mapping[str, Update]) -> tuple[dict[str, Update], float]:
    """The updates with the scales that follow from one alpha, and this alpha.

    A file has one, which is divided by each tensor's rank: the most frequent one, so that most factors stay as they
    are. What a scale differs by goes into B.
    """
    alpha_of = lambda update: float(np.float32(update.scale * update.rank))
    counts = Counter(alpha_of(update) for update in stored.values() if update.scale)
    alpha = counts.most_common(1)[0][0] if counts else 1.0
    changed = {}
    for name, update in stored.items():
        b = update.b if alpha_of(update) == alpha else update.b * np.float32(update.scale * update.rank / alpha)
        factors = np.asarray(update.a, np.float32), np.asarray(b, np.float32)
        changed[name] = Update(*factors, alpha / update.rank)
    return changed, alpha


def refuse(plan: Plan, family: Family, config: ModelConfig, options: WriteOptions) -> list[str]:
    """Why a plan is no LoRA."""
    reasons = [] if plan else ["there is no steering to write"]
    return reasons + refuse_lora(plan, config, dora=False)


def reduce(steered: SteeredModel, options: WriteOptions) -> SteeredModel:
    """The plan as LoRA slots whose scales follow from the file's one alpha."""
    loaded = steered.loaded
    stored, _ = _with_one_alpha(_to_stored(updates_of(steered), loaded))
    plan, steering = plan_of(_from_stored(stored, loaded), loaded.config)
    return replace(steered, plan=plan, steering=steering)


def write(reduced: SteeredModel, folder: Path, options: WriteOptions) -> None:
    """Write adapter.gguf."""
    stored, alpha = _with_one_alpha(_to_stored(updates_of(reduced), reduced.loaded))
    metadata: dict[str, GgufValue] = {
        "general.architecture": FAMILIES[reduced.loaded.family].gguf,
        "general.type": "adapter",
        "general.name": options.name,
        "adapter.type": "lora",
        ALPHA: alpha,
    }
    tensors = [
        plain(f"{name}.weight.lora_{part}", factor)
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
