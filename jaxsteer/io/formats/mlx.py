"""LoRA and DoRA folders of MLX-LM: adapter_config.json and adapters.safetensors."""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np

from jaxsteer.io.files import Json, read_json, write_json
from jaxsteer.io.formats import peft
from jaxsteer.io.formats.format import Format, Given, Use, WriteOptions
from jaxsteer.io.formats.modules import Module, with_magnitudes
from jaxsteer.io.formats.peft import changes, fitted, from_stored, layers_of, tensors_of, to_stored
from jaxsteer.io.formats.pieces import base_named_in, base_needed, values
from jaxsteer.io.formats.updates import Update, plan_of, updates_of
from jaxsteer.io.load import LoadedModel
from jaxsteer.io.safetensors_file import ToWrite, write_safetensors
from jaxsteer.io.source import hub_id
from jaxsteer.io.steered import SteeredModel
from jaxsteer.io.stored import Stored
from jaxsteer.models.config import ModelConfig
from jaxsteer.models.families import FAMILIES
from jaxsteer.models.families.table import Family
from jaxsteer.types import Plan

CONFIG, WEIGHTS = "adapter_config.json", "adapters.safetensors"
_OTHER_NAMES = "MLX-LM names the layers of this family otherwise than its files do, which is not supported"
_A, _B, _MAGNITUDE = "lora_a", "lora_b", "m"


def recognises(path: Path) -> bool:
    """Whether a folder has MLX-LM's files."""
    return (path / CONFIG).is_file() and (path / WEIGHTS).is_file()


def refuse(plan: Plan, family: Family, config: ModelConfig, options: WriteOptions) -> list[str]:
    """Why a plan cannot be written as LoRA for MLX-LM."""
    other = [f"{family.name}: {_OTHER_NAMES}. Merge it (--to hf)"] if family.prefix else []
    return other + peft.refuse(plan, family, config, options)


def read(path: Path, loaded: LoadedModel | None, given: Given) -> SteeredModel:
    """Read a folder; the plan has LoRA or DoRA slots."""
    loaded = base_needed(path, loaded)
    if FAMILIES[loaded.family].prefix:
        raise ValueError(f"{path}: {loaded.family}: {_OTHER_NAMES}")
    raw = read_json(path / CONFIG)
    if problems := _problems(raw):
        raise ValueError(f"{path / CONFIG}: {'; '.join(problems)}")
    targets = _targets(raw, loaded)
    parts: dict[str, dict[str, Stored]] = {}
    unknown = []
    file, tensors = tensors_of(path, WEIGHTS)
    for tensor, stored in tensors.items():
        name, _, part = tensor.rpartition(".")
        if name in targets and part in (_A, _B, _MAGNITUDE):
            parts.setdefault(name, {})[part] = stored
        else:
            unknown.append(tensor)
    if unknown or not parts:
        what = (
            f"holds {', '.join(sorted(unknown)[:5])}, which {CONFIG} does not target" if unknown else "holds no updates"
        )
        raise ValueError(f"{file}: {what} in this model. Is this its base?")
    updates = {name: _update(file, name, own, raw, targets[name]) for name, own in parts.items()}
    return fitted(path, updates, loaded)


def _problems(raw: Mapping[str, Json]) -> list[str]:
    """What in a config is not LoRA or DoRA, or not of its type."""
    kind, said = raw.get("fine_tune_type", "lora"), raw.get("lora_parameters")
    if kind not in ("lora", "dora"):
        return [
            f"fine_tune_type is {reprlib.repr(kind)}; lora and dora are read. Fuse it (mlx_lm.fuse) and load the model"
        ]
    if not isinstance(said, dict):
        return ["has no object lora_parameters"]
    problems = []
    rank, scale, keys = said.get("rank"), said.get("scale"), said.get("keys")
    if type(rank) is not int or not 0 < rank < 2**31:
        problems.append(f"rank is {reprlib.repr(rank)}; expected an integer above 0")
    if type(scale) not in (int, float) or not abs(scale) < 2**63:  # type: ignore[arg-type]
        problems.append(f"scale is {reprlib.repr(scale)}; expected a number")
    if "alpha" in said:
        problems.append("alpha is of an old version, where it changed the scale; write the whole factor as scale")
    if keys is not None and not (isinstance(keys, list) and all(isinstance(key, str) for key in keys)):
        problems.append(f"keys is {reprlib.repr(keys)}; expected a list of names")
    if type(raw.get("num_layers")) is not int:
        problems.append(f"num_layers is {reprlib.repr(raw.get('num_layers'))}; expected an integer")
    return problems


def _targets(raw: Mapping[str, Json], loaded: LoadedModel) -> dict[str, tuple[int, int]]:
    """The layers that a config updates, and their shapes."""
    keys, blocks = raw["lora_parameters"].get("keys"), loaded.config.layers
    first = blocks - raw["num_layers"] if 0 < raw["num_layers"] < blocks else 0
    return {
        name: module.shape(loaded.config)
        for name, (module, layer) in _layers(loaded).items()
        if (layer >= first and (keys is None or module.tail in keys)) or name in (keys or ())
    }


def _layers(loaded: LoadedModel) -> dict[str, tuple[Module, int]]:
    """The model's linear layers by their names in its family's files."""
    return layers_of(FAMILIES[loaded.family], loaded.config)


def _update(
    file: Path, name: str, parts: Mapping[str, Stored], raw: Mapping[str, Json], shape: tuple[int, int]
) -> Update:
    """One layer's update, checked."""
    rank, scale = raw["lora_parameters"]["rank"], raw["lora_parameters"]["scale"]
    expected: dict[str, tuple[int, ...]] = {_A: (shape[0], rank), _B: (rank, shape[1])}
    if raw.get("fine_tune_type") == "dora":
        expected[_MAGNITUDE] = shape[1:]
    if set(parts) != set(expected):
        raise ValueError(f"{file}: {name} has {', '.join(sorted(parts))}; expected {', '.join(sorted(expected))}")
    value = {part: values(file, f"{name}.{part}", stored, expected[part]) for part, stored in parts.items()}
    value = {part: array.astype(np.float32) for part, array in value.items()}
    # Contiguous, as jaxsteer's own.
    a, b = (np.ascontiguousarray(value[part].T) for part in (_A, _B))
    return Update(a, b, float(scale), value.get(_MAGNITUDE))


def reduce(steered: SteeredModel, options: WriteOptions) -> SteeredModel:
    """The same with LoRA slots, or DoRA slots if one is, of one rank and scale: as it will be read."""
    updates, lost = with_magnitudes(updates_of(steered), steered.base), [*steered.lost, *changes(steered.plan)]
    named = to_stored(updates, steered.loaded)
    if len({update.rank for update in named.values()}) > 1 or len({update.scale for update in named.values()}) > 1:
        lost.append("ranks and scales differ: factors are padded to the largest rank, or multiplied by their scale")
    # Magnitudes are rounded once more, as in PEFT's folders.
    for _ in range(2):
        updates = from_stored(_uniform(to_stored(updates, steered.loaded)), steered.loaded)
    plan, steering = plan_of(updates, steered.loaded.config)
    return replace(steered, plan=plan, steering=steering, lost=lost)


def _uniform(updates: Mapping[str, Update]) -> dict[str, Update]:
    """The same updates with one rank and one scale, which MLX-LM has one of for all layers."""
    rank = max(update.rank for update in updates.values())
    same = len({update.scale for update in updates.values()}) == 1
    result = {}
    for name, update in updates.items():
        more = rank - update.rank
        a, b = np.pad(update.a, ((0, more), (0, 0))), np.pad(update.b, ((0, 0), (0, more)))
        b, scale = (b, update.scale) if same else (b * np.float32(update.scale), 1.0)
        result[name] = replace(update, a=a, b=b, scale=scale)
    return result


def write(reduced: SteeredModel, folder: Path, options: WriteOptions) -> None:
    """Write the two files."""
    loaded = reduced.loaded
    updates, layers = _uniform(to_stored(updates_of(reduced), loaded)), _layers(loaded)
    one = next(iter(updates.values()))
    tensors = []
    for name, update in updates.items():
        for part, value in ((_A, update.a.T), (_B, update.b.T), (_MAGNITUDE, update.magnitude)):
            if value is not None:
                tensors.append(ToWrite.of(f"{name}.{part}", value))
    write_safetensors(folder / WEIGHTS, tensors, {"format": "mlx"})
    keys = list(dict.fromkeys(layers[name][0].tail for name in updates))
    said = {
        "model": hub_id(reduced.source),
        "fine_tune_type": "lora" if one.magnitude is None else "dora",
        "num_layers": loaded.config.layers - min(layers[name][1] for name in updates),
        "lora_parameters": {"rank": one.rank, "scale": one.scale, "dropout": 0.0, "keys": keys},
    }
    write_json(folder / CONFIG, said)


FORMAT = Format(
    name="mlx",
    holds="LoRA, rsLoRA, DoRA, PiSSA, and what folds into LoRA",
    programs="MLX-LM",
    recognises=recognises,
    read=read,
    base=base_named_in(CONFIG, "model"),
    refuse=refuse,
    reduce=reduce,
    write=write,
    verify="mlx",
    over="hf",
    use=Use(
        "mlx",
        "adapter",
        """\
from mlx_lm import load
model, tokenizer = load("BASE", adapter_path="FOLDER")""",
        tags=("mlx", "lora"),
    ),
)
