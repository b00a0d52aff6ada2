"""The life of a run, whatever it learns from: evaluate, train, save, evaluate again."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import jax

from jaxsteer.io.files import read_json
from jaxsteer.steering import count_parameters
from jaxsteer.types import Steering
from train.config import TO_BE_RESUMED, TrainConfig
from train.devices.interrupts import Interrupted
from train.devices.machine import device_summary, enable_compilation_cache
from train.devices.processes import is_first, join, on_first
from train.display.console import get_console, print_facts
from train.run.algorithm import SFT, Algorithm
from train.run.checkpoints import check_reachable, local_folder
from train.run.folder import RunFolder, check_run, locked, note_model, open_run, read_inputs, starting, steps_done
from train.run.inputs import check_inputs
from train.run.log import RunLog
from train.run.memory import enough_memory
from train.run.preemption import preemption
from train.run.preview import print_preview
from train.run.result import Result, conclude, print_result
from train.run.saver import Saver
from train.run.start import Prepared, changes_for, check_start, filled, load_training, prepare
from train.run.starts import note_start
from train.run.trackers import check_trackers
from train.run.training import Training, to_floats
from train.run.validation import answers_tests
from train.run.watch import EarlyStopping, NonfiniteGuard
from train.tasks.scoring import BEST


def train(config: TrainConfig, initial: Steering | None = None, algorithm: Algorithm = SFT) -> Result | None:
    """Carry out a run.

    Args:
        config: the run.
        initial: steering to start from, of the config's plan; by default it is initialised from the seed.
        algorithm: how it learns; by default from given answers.

    Returns:
        The result; None if the run was asked to stop early (SIGTERM, Ctrl-C): it is saved and can be resumed.

    Raises:
        ValueError: bad settings or data, before anything is trained; an output folder that holds another run.
        FloatingPointError: the loss is not finite; the last good checkpoint is kept.
    """
    check_trackers(config.track)
    try:
        return _carry_out(config, initial, algorithm)
    except Interrupted as stop:  # while it answered test questions, before the first step or after the last
        again = "Add --resume to continue." if RunFolder(Path(config.out)).config.exists() else "Nothing was begun."
        get_console().print(f"Asked to stop. {stop} {again}", highlight=False, soft_wrap=True)
        return None


def _carry_out(config: TrainConfig, initial: Steering | None, algorithm: Algorithm) -> Result | None:
    with ExitStack() as held:
        run, stored = _claim(config, held)
        prepared = prepare(config, stored, on_first(lambda: read_inputs(run)), algorithm)
        held.enter_context(starting(run))
        _open(prepared, run, resume=stored is not None)
        return _train(prepared, run, initial, resume=stored is not None)


def _train(prepared: Prepared, run: RunFolder, initial: Steering | None, *, resume: bool) -> Result | None:
    enable_compilation_cache()
    config, algorithm = prepared.config, prepared.algorithm
    training = load_training(prepared, initial)
    if (sample := training.loaded.sample) is not None:
        on_first(lambda: note_model(run, sample.digest))
    evaluator = prepared.evaluator.steered_by(training.program.model, training.loaded)
    evaluator = evaluator.measuring(algorithm.measure(training))
    _print_run(config, training)
    with Saver(config, run, training, resume=resume) as saver, preemption() as stop:
        resumed = saver.resumed
        state, start = saver.restore(training.state) if resumed else (training.state, 0)
        check_start(prepared, start)
        if is_first():
            note_start(run, training, start)
        left = range(start, training.steps)
        with RunLog(config, run, training, start, resumed=resumed) as log, algorithm.feed(training, run, left) as feed:
            # ---- before
            with enough_memory(config, "evaluation"):
                before = None
                if answers_tests(config, prepared.splits):
                    before = evaluator.answer(
                        "test", training.untouched(), run.answers_before, title="Evaluating before", reuse=True
                    )
                if start == 0 and config.evaluate_every:
                    log.evaluation(0, evaluator.validate(training.untouched()))

            # ---- training
            guard = NonfiniteGuard(config, training.data, max((r.get("skipped", 0) for r in log.history), default=0))
            earlier = [row[config.select_by] for row in log.history if row["step"] and config.select_by in row]
            early = EarlyStopping.replay(config.patience, BEST[config.select_by], earlier)
            for done in _steps(start, training.steps, early):
                with log.timed(done), enough_memory(config, "step"):
                    state, metrics = training.step(state, feed.take(done - 1, state))
                    values = to_floats(metrics) | {"data_wait": feed.waited} | feed.facts()
                values |= guard.examine(done, values)
                log.step(done, state, values, skipped=guard.skipped)
                if skipped := guard.check(done, values, saver.last_good):
                    log.note(skipped)
                for line in feed.notes(done):
                    log.note(line)

                # ---- evaluation and checkpoint
                improved = False
                if _evaluation_due(config, done, training.steps):
                    validation = evaluator.validate(training.answering(state))
                    log.evaluation(done, validation)
                    values |= validation.results
                    improved = early.update(validation.results[config.select_by])
                asked, whole = stop.requested(done), feed.may_save(done)
                if whole and (saver.due(done) or asked or early.should_stop or (improved and config.patience)):
                    saver.save(done, state, values)
                if whole and asked and done < training.steps:
                    saver.wait()
                    log.note(f"Asked to stop: saved at step {done}. Add --resume to continue.")
                    return None

            # ---- which state is kept
            if early.should_stop:
                log.note(f"No improvement in {config.patience} consecutive evaluations: training stops.")
                if best := saver.restore_best(state):
                    state, step = best
                    log.note(f"Kept: step {step}, the best by validation.")
            if guard.skipped:
                log.note(f"{guard.skipped} steps were skipped: the lines of {run.metrics} with 'examples' name them.")

    result = conclude(run, training, evaluator, state, before, log.timer)
    if is_first():
        algorithm.draw(run)
    return result


def _steps(start: int, steps: int, early: EarlyStopping) -> Iterator[int]:
    """The steps that are left, counted from 1, until early stopping ends them."""
    for done in range(start + 1, steps + 1):
        if early.should_stop:
            return
        yield done


def _evaluation_due(config: TrainConfig, done: int, steps: int) -> bool:
    return config.evaluate_every > 0 and (done % config.evaluate_every == 0 or done == steps)


def _claim(config: TrainConfig, held: ExitStack) -> tuple[RunFolder, dict[str, Any] | None]:
    """Lock the run's folder, once for all processes, and refuse it if it is another run's.

    Returns:
        The folder, and the settings in it if its run is resumed, else None.
    """
    run = RunFolder(Path(config.out))

    def claim() -> dict[str, Any] | None:
        if config.checkpoints is not None:
            check_reachable(config.checkpoints)
        held.enter_context(locked(run.folder))
        if config.checkpoints is not None and (elsewhere := local_folder(config.checkpoints)) is not None:
            held.enter_context(locked(elsewhere))
        stored, resume = _stored(config, run)
        check_run(run.folder, filled(config, stored).to_json(), resume=resume, changes=changes_for(config))
        return stored

    return run, on_first(claim)


def _stored(config: TrainConfig, run: RunFolder) -> tuple[dict[str, Any] | None, bool]:
    """The settings of the run that the folder holds, if it must not be started over; and whether to resume it."""
    resume = config.resume or (config.auto_resume and run.begun)
    return read_json(run.config) if run.config.exists() and (resume or run.begun) else None, resume


def _open(prepared: Prepared, run: RunFolder, *, resume: bool) -> None:
    """Write what the run is into its folder, or compare it with what the folder says."""
    settings, changes = prepared.settings, changes_for(prepared.config)

    def open_it() -> None:
        if resume and (done := steps_done(run)) > prepared.steps:
            raise ValueError(f"{run.folder}: has done {done} steps already, and is now to do {prepared.steps} in all")
        open_run(run.folder, settings, resume=resume, inputs=prepared.inputs, changes=changes)

    on_first(open_it)
    if not run.config.exists():
        raise ValueError(
            f"{run.folder}: process {jax.process_index()} does not see the folder that process 0 has made; "
            "with several hosts --out must be on a file system that all of them share"
        )


def _print_run(config: TrainConfig, training: Training) -> None:
    """The facts of a run, at its start."""
    mesh, (kernel, reason) = training.program.mesh, training.program.attention
    sharding = {}
    if mesh is not None:
        sizes = " x ".join(f"{name} {size}" for name, size in mesh.shape.items())
        idle = f" ({mesh.size} of {jax.device_count()} devices)" if mesh.size < jax.device_count() else ""
        sharding["mesh"] = f"{sizes}{idle}"
    if mesh is not None or kernel != "rows":
        sharding["attention"] = f"{kernel}: {reason}"
    fill = training.data.fill
    filling = "" if math.isnan(fill) else f"; rows {100 * fill:.1f} % real tokens"
    print_facts(
        {
            "device": device_summary(),
            **sharding,
            "model": f"{config.model}, {training.total:,} parameters",
            "training": f"{', '.join(config.plan) or 'the base'}: {training.trainable:,} parameters",
            "data": f"{training.report}{filling}",
        }
    )


def preview(config: TrainConfig, algorithm: Algorithm = SFT) -> None:
    """Check and print a run, and write nothing.

    Args:
        config: the run.
        algorithm: how it learns; by default from given answers.

    Raises:
        ValueError: as `train`, before anything is trained.
    """
    check_trackers(config.track)
    run = RunFolder(Path(config.out))
    stored, resume = _stored(config, run)
    check_run(run.folder, filled(config, stored).to_json(), resume=resume, changes=changes_for(config))
    prepared = prepare(config, stored, read_inputs(run), algorithm)
    if resume and not config.new_data:
        check_inputs(run.folder, read_inputs(run), prepared.inputs)
    enable_compilation_cache()
    print_facts(
        {"device": device_summary(), "model": f"{config.model}, {count_parameters(prepared.model.base):,} parameters"}
    )
    print_preview(prepared)


def run_training(config: TrainConfig, algorithm: Algorithm = SFT, *, dry_run: bool = False) -> None:
    """What a command does once its settings are read: carry out the run and print what came out, or preview it.

    Args:
        config: the run.
        algorithm: how it learns; by default from given answers.
        dry_run: only check and print it.

    Raises:
        SystemExit: the run was asked to stop early, and can be resumed.
    """
    join(config.distributed)
    if dry_run:
        preview(config, algorithm)
        return
    result = train(config, algorithm=algorithm)
    if result is None:
        raise SystemExit(TO_BE_RESUMED)
    print_result(result)
