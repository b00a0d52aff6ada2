"""jaxsteer's own steering file as a format, so that what is imported can be kept as one."""

from __future__ import annotations

from pathlib import Path

from jaxsteer.io.formats.format import JAXSTEER, Format, Given, Use, WriteOptions
from jaxsteer.io.load import LoadedModel
from jaxsteer.io.safetensors_file import open_safetensors
from jaxsteer.io.steered import SteeredModel
from jaxsteer.io.steering_file import FORMAT as MARK
from jaxsteer.io.steering_file import load_steering, save_steering
from jaxsteer.models.config import ModelConfig
from jaxsteer.models.families.table import Family
from jaxsteer.types import Plan

NAME = "steering.safetensors"


def _file(path: Path) -> Path:
    """The steering file itself, of a run's folder or an export's."""
    return path / NAME if path.is_dir() else path


def _recognises(path: Path) -> bool:
    file = _file(path)
    if not file.is_file() or file.suffix != ".safetensors":
        return False
    try:
        return open_safetensors(file)[1].get("format") == MARK
    except ValueError:
        return False


def _read(path: Path, loaded: LoadedModel | None, given: Given) -> SteeredModel:
    file = load_steering(_file(path))
    assert loaded is not None
    file.check(loaded.config)
    return SteeredModel(loaded, file.plan, file.steering, file.model_name, file.notes)


def _refuse(plan: Plan, family: Family, config: ModelConfig, options: WriteOptions) -> list[str]:
    return [] if plan else ["there is no steering to write: the weights hold everything. Use the model as it is"]


def _write(steered: SteeredModel, folder: Path, options: WriteOptions) -> None:
    save_steering(
        folder / NAME,
        steered.steering,
        steered.plan,
        model_name=steered.source or steered.loaded.name,
        config=steered.loaded.config,
        notes=steered.notes,
        sample=steered.loaded.sample,
    )


FORMAT = Format(
    name="jaxsteer",
    holds="any plan",
    programs="jaxsteer",
    recognises=_recognises,
    read=_read,
    base=lambda path: load_steering(_file(path)).model_name,
    refuse=_refuse,
    reduce=lambda steered, options: steered,
    write=_write,
    use=Use(
        "jaxsteer",
        "adapter",
        JAXSTEER,
    ),
)
