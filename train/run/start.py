"""The start of a run: everything that is read and checked before the weights are, from the model's config alone."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from jaxsteer.io import LoadedModel, SteeringFile, load_steering
from jaxsteer.models.config import beyond_context
from jaxsteer.plans import format_plan, parse_plan
from jaxsteer.types import Steering
from train.base_models import describe
from train.config import TrainConfig, changeable_settings
from train.display.console import say
from train.evaluation.evaluator import Evaluator
from train.run.algorithm import SFT, Algorithm
from train.run.checkpoints import check_reachable
from train.run.folder import Changes, RunFolder
from train.run.inputs import data_inputs, example_inputs
from train.run.profiling import check_profile
from train.run.program import Program, make_program, mesh_of
from train.run.row_length import with_row_length
from train.run.saver import saved_date
from train.run.training import (
    RunData,
    Training,
    check_trains,
    encoding_of,
    load_base_model,
    make_evaluator,
    make_training,
)
from train.run.validation import Splits, decide, read_splits

SCHEDULE_STEPS = 1000
"""Length of the schedules while the data, which decides it, is not read."""


@dataclass(frozen=True)
class Prepared:
    """A run that can start as soon as its weights are read.

    algorithm  how it learns
    config     its settings, with what they left open filled in: the plan of the steering that it starts from, the day,
               and what its checkpoints are chosen by
    settings   those that define it, for config.json; what checkpoints are chosen by may still follow from the data
    model      the base model without its weights
    program    from shapes; without a mesh's devices nothing of it is placed
    data       training data, tokenised
    steps      number of updates
    splits     validation and test examples
    evaluator  of these examples
    start      the steering that it starts from
    inputs     what it reads, for inputs.json
    """

    algorithm: Algorithm
    config: TrainConfig
    settings: dict[str, Any]
    model: LoadedModel
    program: Program
    data: RunData
    steps: int
    splits: Splits
    evaluator: Evaluator
    start: SteeringFile | None
    inputs: dict[str, Any]


def prepare(
    config: TrainConfig, stored: Mapping[str, Any] | None, inputs: Mapping[str, Any], algorithm: Algorithm = SFT
) -> Prepared:
    """Read and check everything but the weights, what is cheap first.

    Args:
        config: the run.
        stored: settings in the folder of a run that is resumed.
        inputs: what that run reads.
        algorithm: how it learns.

    Raises:
        ValueError: settings, a plan or data that no run could have.
    """
    if config.checkpoints is not None:
        check_reachable(config.checkpoints)
    config = filled(config, {"date": saved_date(config)} if stored is None and config.date is None else stored)
    start = _start_of(config, stored, inputs)
    model = describe(config.model, config.dtype, quantised=config.quantise == "int8", tokenizer=config.tokenizer)
    config = with_row_length(_completed(config, start, model), model)
    mesh = mesh_of(config)
    program = make_program(config, model.config, model.base, steps=config.steps or SCHEDULE_STEPS, mesh=mesh)
    check_trains(program)
    if config.steps is not None:
        check_profile(config.profile, 0, config.steps)
    splits = read_splits(config)
    settings, config = config.to_json(), decide(config, splits, algorithm.metric)
    evaluator = make_evaluator(config, model, program, splits)
    data = algorithm.read_data(config, model)
    if note := beyond_context(model.config, data.report.longest):
        say(f"Note: the longest example has {note}", stderr=False)
    steps = config.steps or data.source.steps(config.epochs)
    check_profile(config.profile, 0, steps)
    program = make_program(config, model.config, model.base, steps=steps, mesh=mesh)
    read = {"train": data_inputs(*data)}
    if config.evaluate_every and splits["validation"]:
        read["validation"] = example_inputs(splits["validation"])
    if config.start_from is not None:
        read["start_from"] = inputs.get("start_from") or _start_inputs(config, start)
    return Prepared(algorithm, config, settings, model, program, data, steps, splits, evaluator, start, read)


def filled(config: TrainConfig, stored: Mapping[str, Any] | None) -> TrainConfig:
    """The settings with what they leave open as a run decided it when it started, if there is such a run."""
    if stored is None:
        return config
    if config.date is None:
        config = replace(config, date=stored.get("date"))
    if not config.sequence_length:
        config = replace(config, sequence_length=stored.get("sequence_length", 0))
    if config.start_from is not None and config.start_from == stored.get("start_from") and not _has_plan(config):
        config = replace(config, plan=tuple(stored["plan"]))
    return config


def _start_of(config: TrainConfig, stored: Mapping[str, Any] | None, inputs: Mapping[str, Any]) -> SteeringFile | None:
    """The steering that the run starts from; of a run that is resumed, None if the file is not what it was."""
    if config.start_from is None:
        return None
    if stored is None:
        return read_start(config.start_from)
    try:
        start = read_start(config.start_from)
    except (ValueError, OSError):
        return None  # it is needed only if nothing was saved yet
    return start if inputs.get("start_from", {}).get("sha256") == _digest(start.path) else None


def read_start(source: str, option: str = "--start-from") -> SteeringFile:
    """The steering that a run starts from: a file, or that of a run's folder.

    Args:
        source: the file or the folder.
        option: that names it, for error messages.

    Raises:
        ValueError: there is none, or it cannot be read.
    """
    path = Path(source)
    if path.is_dir():
        path = RunFolder(path).steering
        if not path.exists():
            raise ValueError(f"{option} {source}: no finished run of a plan (it has no {path.name})")
    if not path.is_file():
        raise ValueError(f"{option} {source}: no such file or folder")
    return load_steering(path)


def _completed(config: TrainConfig, start: SteeringFile | None, model: LoadedModel) -> TrainConfig:
    """The settings with plan and day filled in."""
    if start is not None:
        start.check(model.config)
        texts = format_plan(start.plan)
        if not _has_plan(config):
            config = replace(config, plan=texts)
            say(f"Plan of {start.path}: {'; '.join(texts)}", stderr=False)
        elif parse_plan(config.plan, model.config) != start.plan:
            quoted = " ".join(f'"{text}"' for text in texts)
            raise ValueError(
                f"--start-from {start.path}: has another plan than this run. Its own is --plan {quoted}; this run's is "
                f"{'; '.join(config.plan)}"
            )
    return replace(config, date=encoding_of(config).dated(model.require_tokenizer()).date)


def _has_plan(config: TrainConfig) -> bool:
    return bool(config.plan) and config.plan != TrainConfig.plan


def _start_inputs(config: TrainConfig, start: SteeringFile | None) -> dict[str, Any]:
    """Where the steering comes from, and what it was trained on before."""
    if start is None:
        return {"path": config.start_from}
    notes: dict[str, Any] = {name: start.notes[name] for name in ("inputs", "history") if name in start.notes}
    return {"path": config.start_from, "sha256": _digest(start.path), "model": start.model_name, **notes}


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def changes_for(config: TrainConfig) -> Changes:
    """What may differ when the run is resumed."""
    return Changes(changeable_settings(type(config)), config.extend, config.new_data)


def load_training(prepared: Prepared, initial: Steering | None = None) -> Training:
    """Read the weights and build the run's parts.

    Args:
        prepared: the run.
        initial: steering to start from, instead of the run's own.
    """
    config = prepared.config
    loaded = load_base_model(config, prepared.program.placement.base)
    if initial is None and prepared.start is not None:
        initial = prepared.start.steering
        if said := prepared.start.check_weights(loaded.sample, other_base=True):
            say(f"Note: {said}", stderr=False)
    training = make_training(config, loaded, initial, prepared.data)
    return replace(training, given=prepared.algorithm.given(training))


def check_start(prepared: Prepared, done: int) -> None:
    """Refuse to begin a run whose starting point is not what it was.

    Args:
        prepared: the run.
        done: number of steps that are done.

    Raises:
        ValueError: the file to start from is gone or has changed, and nothing is done, or it is the reference.
    """
    needed = done == 0 or prepared.algorithm.refers(prepared.config)
    if needed and prepared.config.start_from is not None and prepared.start is None:
        why = "it is the reference of the run" if done else "the run has saved nothing yet"
        raise ValueError(
            f"--start-from {prepared.config.start_from}: is gone, or another than when this run was started, and "
            f"{why}; put it back, or use another --out"
        )
