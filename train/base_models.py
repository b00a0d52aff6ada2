"""Base models and steering files as commands take them: with a progress bar, and checked against each other."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from jaxsteer.io import (
    FORMATS,
    WHEEL_MODELS,
    LoadedModel,
    SteeringFile,
    compute_dtype,
    describe_model,
    fetch_named,
    load_config,
    load_model,
    load_steering,
    sample_weights,
)
from jaxsteer.io.files import read_json
from jaxsteer.io.load import require_tokenizer
from jaxsteer.io.provenance import BaseOptions
from jaxsteer.io.stored import Place
from jaxsteer.plans import parse_plan, validate_plan
from jaxsteer.types import Plan, Steering
from train.display.console import get_console, say


def resolve_model(name: str) -> Path | str:
    """What to load a model from: the file of a name in WHEEL_MODELS, with a message while it is fetched, or `name`.

    Raises:
        ValueError: the download failed, or its checksum is wrong; or `name` is a run's folder.
    """
    if name in WHEEL_MODELS:
        return fetch_named(name, say)
    if _is_run(Path(name)):
        raise ValueError(f"{name}: a run, not a model; give it as steering, which names its base model")
    return name


def _is_run(folder: Path) -> bool:
    """Whether a folder is that of a run, by its settings."""
    settings = read_json(folder / "config.json") if (folder / "config.json").is_file() else None
    return isinstance(settings, dict) and not settings.keys().isdisjoint(("plan", "run"))  # LoFiT's has "run"


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


def describe(name: str, dtype: str = "auto", *, quantised: bool = False, tokenizer: str | None = None) -> LoadedModel:
    """All of a model but its weights, of which there are only shapes; see `load`."""
    source = resolve_model(name)
    return describe_model(source, dtype=compute_dtype(dtype), quantised=quantised, tokenizer=tokenizer)


def load_steered(
    source: str | SteeringFile,
    model: str | None,
    dtype: str = "auto",
    place: Place | None = None,
    *,
    other_base: bool = False,
) -> tuple[LoadedModel, SteeringFile | None]:
    """Load a steering file and its base model; the file is checked against the model before weights are read.

    The base is loaded in int8, and with another tokenizer, if the steering was trained so.

    Args:
        source: path of the steering file or of a run's folder, or "none" for the pretrained model; or a file that is
            already read.
        model: name of the base model; None: as the file says.
        dtype: data type of the weights.
        place: gives the sharding of each leaf of the weights, see `train.devices.placement`.
        other_base: steer a model of the same config whose weights are others.

    Raises:
        ValueError: no such file; neither names a model; the file belongs to another model.
    """
    file = source if isinstance(source, SteeringFile) else read_steered(source)
    name = find_base(file, model)
    if file is not None:
        check_base(file, name, other_base=other_base)
    options = BaseOptions() if file is None else file.base_options
    require_tokenizer(resolve_model(name), options.tokenizer)
    return load(name, dtype, place, **options._asdict()), file


def find_base(file: SteeringFile | None, model: str | None) -> str:
    """The name of the model to load: as given, else the one that a steering file was made for.

    A run that also trained its base wrote it into `model` beside the steering file; it is found there if both were
    moved.

    Raises:
        ValueError: neither names a model.
    """
    if model is not None:
        return model
    if file is None:
        raise ValueError("which model? Give --model, or a steering file, which names its own")
    beside = file.path.parent / Path(file.model_name).name
    if beside.name == "model" and not Path(file.model_name).expanduser().exists() and beside.is_dir():
        return str(beside)
    return file.model_name


def check_base(file: SteeringFile, name: str, *, other_base: bool = False) -> None:
    """Compare a steering file with the model that it is to steer, of which little is read; print what is to be known.

    Args:
        file: the steering file.
        name: of the model.
        other_base: accept other weights.

    Raises:
        ValueError: the model is not there, or has another config, or other weights and `other_base` is not set.
    """
    try:
        source = resolve_model(name)
        config, sample = load_config(source), sample_weights(source)
    except ValueError as error:
        if name != file.model_name or Path(name).expanduser().exists():
            raise
        raise ValueError(
            f"{file.path}: made for {name}, which is not here: {error}. If it was a folder or a file that was moved, "
            f"or a path from another folder than {Path.cwd()}, give its place now: --model PATH"
        ) from None
    file.check(config)
    try:
        said = file.check_weights(sample, other_base=other_base)
    except ValueError as error:
        raise ValueError(
            f"{error}. Give the model that it was made for (--model), or steer this one on purpose: --other-base"
        ) from None
    _note(said)


def _note(said: str) -> None:
    if said:
        say(f"note: {said}")


MODEL_NOTES = "jaxsteer.json"
"""Name of the file in the folder of a fully fine-tuned model that says how it was made."""


def trained_date(folder: Path) -> str | None:
    """The day that a chat template printed when the model in a folder was trained, as an ISO date, if it is known."""
    file = folder / MODEL_NOTES
    notes = read_json(file) if file.is_file() else {}
    return notes.get("date") if isinstance(notes, dict) else None


def read_steered(path: str) -> SteeringFile | None:
    """Read a steering file; None for the word "none".

    Args:
        path: of the file, or of the folder of a run that has one.

    Raises:
        ValueError: no such file, or it cannot be read; the run has not finished, or trained the model instead.
    """
    if path == "none":
        return None
    place = Path(path)
    if place.exists():
        _refuse_foreign(place)
    if place.is_dir():
        return load_steering(_of_run(place))
    if not place.is_file():
        raise ValueError(f"{path}: no such file (expected a steering file, a run's folder, or the word none)")
    try:
        return load_steering(place)
    except ValueError:
        if place.suffix == ".safetensors":
            raise
        raise ValueError(f"{path}: not a steering file (*.safetensors)") from None


def _refuse_foreign(place: Path) -> None:
    """Refuse the steering of other programs, with the command that brings it here.

    Raises:
        ValueError: a file or folder in one of their formats; whole models are not meant.
    """
    formats = [name for name, row in FORMATS.items() if not row.whole and row.recognises(place)]
    if formats and "jaxsteer" not in formats:
        raise ValueError(
            f"{place}: in the format {formats[0]}; make a steering file of it first: jaxsteer convert {place} --out "
            "FOLDER"
        )


STEERING = "steering.safetensors"
"""Name of the steering file in a run's folder."""


def _of_run(folder: Path) -> Path:
    """The steering file in a run's folder.

    Raises:
        ValueError: there is none; the message says what the folder is, and what to give instead.
    """
    if (folder / STEERING).is_file():
        return folder / STEERING
    stages = sorted(path.parent.name for path in folder.glob(f"*/{STEERING}"))
    if (folder / "model" / "config.json").is_file():
        raise ValueError(
            f"{folder}: this run trained the model itself and has no steering; give the model: none --model "
            f"{folder / 'model'}"
        )
    if any(folder.glob("*.safetensors")) and (folder / "config.json").is_file():
        raise ValueError(f"{folder}: a model, not a run; to use it without steering: none --model {folder}")
    if _is_run(folder):
        raise ValueError(
            f"{folder}: the run has not finished, so it has no {STEERING} yet; continue it with --resume, or give "
            "another run"
        )
    if stages:
        raise ValueError(f"{folder}: not one run but several; give one of {', '.join(str(folder / s) for s in stages)}")
    raise ValueError(f"{folder}: no {STEERING} there; expected a run's folder, a steering file, or the word none")


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


def main() -> None:
    """Download a model and print its path."""
    if len(sys.argv) != 2 or sys.argv[1] not in WHEEL_MODELS:
        raise SystemExit(f"usage: python -m train.base_models {' | '.join(WHEEL_MODELS)}")
    print(resolve_model(sys.argv[1]))


if __name__ == "__main__":
    main()
