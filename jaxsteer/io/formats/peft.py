"""LoRA folders of Hugging Face's PEFT: adapter_config.json and adapter_model.safetensors."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType

import numpy as np

from jaxsteer.io.files import Json, write_json
from jaxsteer.io.formats.format import Format, Given, Use, WriteOptions
from jaxsteer.io.formats.modules import Module, by_module, by_place, has_conv1d, modules_of, norms, with_magnitudes
from jaxsteer.io.formats.peft_config import CONFIG, PeftConfig, config_of, read_config
from jaxsteer.io.formats.pieces import base_named_in, base_needed, values
from jaxsteer.io.formats.updates import Update, Updates, plan_of, refuse_lora, updates_of
from jaxsteer.io.load import LoadedModel
from jaxsteer.io.pickles import open_pickle
from jaxsteer.io.safetensors_file import ToWrite, open_safetensors, write_safetensors
from jaxsteer.io.source import hub_id
from jaxsteer.io.steered import SteeredModel
from jaxsteer.io.stored import Stored
from jaxsteer.models.config import ModelConfig
from jaxsteer.models.families import FAMILIES
from jaxsteer.models.families.table import Family
from jaxsteer.plans import method_name, validate_plan
from jaxsteer.types import Plan

WEIGHTS, PICKLED = "adapter_model.safetensors", "adapter_model.bin"
_PREFIX = "base_model.model."
_A, _B, _MAGNITUDE = "lora_A.weight", "lora_B.weight", "lora_magnitude_vector"
_ENDINGS = {f".{part}": part for part in (_A, _B, _MAGNITUDE)} | {f".{_MAGNITUDE}.weight": _MAGNITUDE}
Shapes = Mapping[str, tuple[int, int]]
"""Full name of a layer -> numbers of its inputs and outputs."""


def recognises(path: Path) -> bool:
    """Whether a folder has PEFT's files."""
    return (path / WEIGHTS).is_file() or (path / PICKLED).is_file()


def read(path: Path, loaded: LoadedModel | None, given: Given) -> SteeredModel:
    """Read a LoRA folder; the plan has LoRA or DoRA slots."""
    config = read_config(path / CONFIG)
    loaded = base_needed(path, loaded, config.raw.get("base_model_name_or_path"))
    family = FAMILIES[loaded.family]
    modules = layers_of(family, loaded.config)
    shapes = {name: module.shape(loaded.config) for name, (module, _) in modules.items()}
    updates = read_peft(path, config, shapes)
    if config.pissa:
        updates = {
            name: _with_initial(update, _kernel(name, modules, loaded), f"{path / CONFIG}: {name}")
            for name, update in updates.items()
        }
    return fitted(path, updates, loaded)


def fitted(path: Path, updates: Mapping[str, Update], loaded: LoadedModel) -> SteeredModel:
    """What was stored, as slots.

    Raises:
        ValueError: a rank that does not fit the model.
    """
    plan, steering = plan_of(from_stored(updates, loaded), loaded.config)
    try:
        validate_plan(plan, loaded.config)
    except ValueError as error:
        raise ValueError(f"{path}: does not fit {loaded.name}: {error}") from None
    return SteeredModel(loaded, plan, steering)


def refuse(plan: Plan, family: Family, config: ModelConfig, options: WriteOptions) -> list[str]:
    """Why a plan cannot be written as LoRA."""
    if not plan:
        return ["the plan has no slots: the weights hold everything; write the model (--to hf)"]
    return refuse_lora(plan, config)


def reduce(steered: SteeredModel, options: WriteOptions) -> SteeredModel:
    """The same with LoRA slots, or DoRA slots if one is: as it will be read."""
    updates = with_magnitudes(updates_of(steered), steered.base)
    # A magnitude is stored with the kernel's norm added, and rounded: after the second time it stays.
    for _ in range(2):
        updates = from_stored(to_stored(updates, steered.loaded), steered.loaded)
    plan, steering = plan_of(updates, steered.loaded.config)
    return replace(steered, plan=plan, steering=steering, lost=[*steered.lost, *changes(steered.plan)])


def changes(plan: Plan) -> list[str]:
    """What a LoRA folder does not hold of a plan, a sentence for each slot."""
    sentences = []
    for slot in plan:
        name, sites = method_name(slot.method), ",".join(slot.sites)
        if name not in ("lora", "dora"):
            sentences.append(f"slot {slot.name!r} ({name} @ {sites}) is written as the LoRA that computes the same")
        if rate := getattr(slot.method, "dropout", 0.0):
            sentences.append(f"slot {slot.name!r} ({name} @ {sites}) had dropout {rate:g} in training")
    return sentences


def write(reduced: SteeredModel, folder: Path, options: WriteOptions) -> None:
    """Write the two files."""
    loaded = reduced.loaded
    layers = layers_of(FAMILIES[loaded.family], loaded.config)
    flat = has_conv1d(FAMILIES[loaded.family], loaded.config)  # PEFT sets it too, with a warning
    said = {"base_model_name_or_path": hub_id(reduced.source), "fan_in_fan_out": flat}
    write_peft(folder, to_stored(updates_of(reduced), loaded), layers, said)


def layers_of(family: Family, config: ModelConfig) -> dict[str, tuple[Module, int]]:
    """Every linear layer of a model's blocks by its full name, as module and number of the block."""
    return {module.named(i): (module, i) for module in modules_of(family, config) for i in range(config.layers)}


def write_peft(
    folder: Path,
    updates: Mapping[str, Update],
    names: Collection[str],
    said: Mapping[str, Json],
    metadata: Mapping[str, str] = MappingProxyType({}),
) -> None:
    """Write updates as a LoRA folder.

    Args:
        folder: an existing folder.
        updates: by the full names of the layers; a magnitude is that of the whole kernel, as PEFT stores it.
        names: of all linear layers in the model's blocks.
        said: more fields of adapter_config.json.
        metadata: of the file with the tensors.
    """
    tensors = []
    for name, update in updates.items():
        for part, value in ((_A, update.a), (_B, update.b), (_MAGNITUDE, update.magnitude)):
            if value is not None:
                tensors.append(ToWrite.of(f"{_PREFIX}{name}.{part}", value))
    write_safetensors(folder / WEIGHTS, tensors, {"format": "pt", **metadata})
    write_json(folder / CONFIG, config_of(updates, names) | dict(said))


def read_peft(folder: Path, config: PeftConfig, shapes: Shapes) -> dict[str, Update]:
    """Read the updates of a LoRA folder by the full names of the layers, as they are stored.

    Args:
        folder: the folder.
        config: its adapter_config.json.
        shapes: the layers that the model has.

    Raises:
        ValueError: tensors that are damaged, unknown, missing or of the wrong shape, or not what the config promises.
    """
    path, tensors = tensors_of(folder, WEIGHTS, PICKLED)
    parts: dict[str, dict[str, Stored]] = {}
    unknown = []
    for tensor, stored in tensors.items():
        name, part = _parsed(tensor)
        if name not in shapes or part in parts.setdefault(name, {}):
            unknown.append(tensor)
        else:
            parts[name][part] = stored
    if unknown:
        raise ValueError(
            f"{path}: holds {', '.join(sorted(unknown)[:5])}{' and others' if len(unknown) > 5 else ''}, which are no "
            "LoRA of a projection in this model's blocks (embeddings and the head are not supported). Is this its base?"
        )
    if missing := [name for name in shapes if name not in parts and config.targets(name)]:
        raise ValueError(f"{path}: has no tensors for {', '.join(missing[:5])}, which {CONFIG} targets")
    if not parts:
        raise ValueError(f"{path}: holds no updates")
    return {name: _update(path, name, parts[name], config, shapes[name]) for name in shapes if name in parts}


def tensors_of(folder: Path, *names: str) -> tuple[Path, dict[str, Stored]]:
    """The first of these files that a folder has, safetensors or PyTorch's, and its tensors.

    Raises:
        ValueError: there is none, or it is damaged.
    """
    for file in (folder / name for name in names):
        if file.is_file():
            return file, open_safetensors(file)[0] if file.suffix == ".safetensors" else open_pickle(file)
    raise ValueError(f"{folder}: has no {' or '.join(names)}")


def _parsed(tensor: str) -> tuple[str, str]:
    """Layer and part that a tensor's name names; empty if it names none."""
    ending = next((ending for ending in _ENDINGS if tensor.endswith(ending)), "")
    if not tensor.startswith(_PREFIX) or not ending:
        return "", ""
    return tensor[len(_PREFIX) : -len(ending)], _ENDINGS[ending]


def _update(path: Path, name: str, parts: Mapping[str, Stored], config: PeftConfig, shape: tuple[int, int]) -> Update:
    """One layer's update, checked against the config and the layer's shape."""
    where = f"{path}: {name}"
    if not config.targets(name):
        raise ValueError(f"{where}: {CONFIG} does not target it, so that peft would not use it")
    rank, (inputs, outputs) = config.rank(name), shape
    expected: dict[str, tuple[int, ...]] = {_A: (rank, inputs), _B: (outputs, rank)} | (
        {_MAGNITUDE: (outputs,)} if config.dora else {}
    )
    if set(parts) != set(expected):
        raise ValueError(f"{where}: has {', '.join(sorted(parts))}; expected {', '.join(sorted(expected))}")
    value = {part: values(path, f"{name}.{part}", stored, expected[part]) for part, stored in parts.items()}
    value = {part: array.astype(np.float32) for part, array in value.items()}
    return Update(value[_A], value[_B], config.scale(name), value.get(_MAGNITUDE))


def _kernel(name: str, modules: Mapping[str, tuple[Module, int]], loaded: LoadedModel) -> np.ndarray:
    """The kernel of a layer, fp32."""
    module, layer = modules[name]
    return module.kernel(loaded.base, layer)


def _with_initial(update: Update, kernel: np.ndarray, where: str) -> Update:
    """What PEFT computes with a PiSSA file that was not converted: it takes the kernel's best approximation away."""
    if not update.scale > 0 or update.magnitude is not None:
        raise ValueError(f"{where}: init_lora_weights pissa needs an alpha above 0, and no DoRA")
    u, singular, vt = np.linalg.svd(kernel.T.astype(np.float64), full_matrices=False)
    root = np.sqrt(singular[: update.rank] / update.scale)
    a, b = root[:, None] * vt[: update.rank], u[:, : update.rank] * root
    return update.then(Update(a.astype(np.float32), -b.astype(np.float32), update.scale))


def to_stored(updates: Updates, loaded: LoadedModel) -> dict[str, Update]:
    """Updates by the names of layers, with magnitudes of whole kernels."""
    family = FAMILIES[loaded.family]
    return _shifted(by_module(updates, family, loaded.config), loaded, 1)


def from_stored(updates: Mapping[str, Update], loaded: LoadedModel) -> Updates:
    """The inverse of `to_stored`."""
    return by_place(_shifted(updates, loaded, -1), FAMILIES[loaded.family], loaded.config)


def _shifted(updates: Mapping[str, Update], loaded: LoadedModel, sign: int) -> dict[str, Update]:
    """Updates with the norms of the kernels added to their magnitudes, or taken from them."""
    modules = layers_of(FAMILIES[loaded.family], loaded.config)
    return {
        name: update
        if update.magnitude is None
        else replace(update, magnitude=update.magnitude + np.float32(sign) * norms(_kernel(name, modules, loaded)))
        for name, update in updates.items()
    }


FORMAT = Format(
    name="peft",
    holds="LoRA, rsLoRA, DoRA, PiSSA, and what folds into LoRA",
    programs="PEFT, transformers, vLLM, SGLang",
    recognises=recognises,
    read=read,
    base=base_named_in(CONFIG, "base_model_name_or_path"),
    refuse=refuse,
    reduce=reduce,
    write=write,
    verify="peft",
    over="hf",
    use=Use(
        "peft",
        "adapter",
        """\
from peft import PeftModel
from transformers import AutoModelForCausalLM
model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("BASE"), "FOLDER")""",
        tags=("lora",),
    ),
)
