"""jaxsteer's own steering file as a format, so that what is imported can be kept as one."""

from __future__ import annotations

from pathlib import Path

from jaxsteer.io.formats.format import JAXSTEER, Format, Given, Use, WriteOptions
from jaxsteer.io.formats.pieces import base_needed, file_at
from jaxsteer.io.load import LoadedModel
from jaxsteer.io.safetensors_file import open_safetensors
from jaxsteer.io.steered import SteeredModel
from jaxsteer.io.steering_file import FORMAT as MARK
from jaxsteer.io.steering_file import load_steering, save_steering
from jaxsteer.models.config import ModelConfig
from jaxsteer.models.families.table import Family
from jaxsteer.types import Plan

NAME = "steering.safetensors"


def recognises(path: Path) -> bool:
    """Whether this is a steering file, or a folder with one."""
    file = file_at(path, NAME)
    if not file.is_file() or file.suffix != ".safetensors":
        return False
    try:
        return open_safetensors(file)[1].get("format") == MARK
    except ValueError:
        return False


def read(path: Path, loaded: LoadedModel | None, given: Given) -> SteeredModel:
    """The steering of a file, or of a run's folder."""
    file = load_steering(file_at(path, NAME))
    loaded = base_needed(path, loaded)
    file.check(loaded.config)
    return SteeredModel(loaded, file.plan, file.steering, file.model_name, file.notes)


def check(path: Path, loaded: LoadedModel, other_base: bool) -> None:
    """Compare the base model's weights with those that the file was made for."""
    load_steering(file_at(path, NAME)).check_weights(loaded.sample, other_base=other_base)


def refuse(plan: Plan, family: Family, config: ModelConfig, options: WriteOptions) -> list[str]:
    """Why there is nothing to write."""
    return [] if plan else ["there is no steering to write: the weights hold everything. Use the model as it is"]


def write(reduced: SteeredModel, folder: Path, options: WriteOptions) -> None:
    """Write steering.safetensors."""
    save_steering(
        folder / NAME,
        reduced.steering,
        reduced.plan,
        model_name=reduced.source or reduced.loaded.name,
        config=reduced.loaded.config,
        notes=reduced.notes,
        sample=reduced.loaded.sample,
    )


FORMAT = Format(
    name="jaxsteer",
    holds="any plan",
    programs="jaxsteer",
    recognises=recognises,
    read=read,
    check=check,
    base=lambda path: load_steering(file_at(path, NAME)).model_name,
    base_options=lambda path: load_steering(file_at(path, NAME)).base_options,
    refuse=refuse,
    reduce=lambda steered, options: steered,
    write=write,
    use=Use(
        "jaxsteer",
        "adapter",
        JAXSTEER,
    ),
)
