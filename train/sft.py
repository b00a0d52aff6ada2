"""Supervised fine-tuning: `python -m train.sft configs/listops_smollm2.py --optim.lr 3e-3`.

Evaluates the pretrained model, trains what the plan says, evaluates again, and leaves a folder with the config, the
metrics, checkpoints, a portable steering file, the answers before and after, a plot and a summary.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import jax

from jaxsteer.types import Steering
from train.cli import from_command_line, run_main
from train.config import TO_BE_RESUMED, TrainConfig
from train.devices.interrupts import Interrupted
from train.devices.machine import device_summary, enable_compilation_cache
from train.devices.placement import place_on
from train.devices.processes import join, on_first
from train.display.console import get_console, print_facts
from train.run.checkpoints import local_folder
from train.run.folder import RunFolder, locked, open_run
from train.run.log import RunLog
from train.run.preemption import preemption
from train.run.result import Result, conclude, print_result
from train.run.saver import Saver
from train.run.trackers import check_trackers
from train.run.training import Training, load_base_model, make_training, to_floats
from train.run.validation import answers_tests, decide, read_splits
from train.run.watch import EarlyStopping, NonfiniteGuard
from train.tasks.scoring import BEST


def train(config: TrainConfig, initial: Steering | None = None) -> Result | None:
    """Carry out a run.

    Args:
        config: the run.
        initial: steering to start from, of the config's plan; by default it is initialised from the seed.

    Returns:
        The result; None if the run was asked to stop early (SIGTERM, Ctrl-C): it is saved and can be resumed.

    Raises:
        ValueError: bad settings or data, before anything is trained; an output folder that holds another run.
        FloatingPointError: the loss is not finite; the last good checkpoint is kept.
    """
    check_trackers(config.track)
    with ExitStack() as held:
        run, resume = _open(config, held)
        try:
            return _train(config, run, initial, resume=resume)
        except Interrupted as stop:  # while it answered test questions, before the first step or after the last
            get_console().print(f"Asked to stop. {stop} Add --resume to continue.", highlight=False, soft_wrap=True)
            return None


def _train(config: TrainConfig, run: RunFolder, initial: Steering | None, *, resume: bool) -> Result | None:
    enable_compilation_cache()
    splits = read_splits(config)
    config = decide(config, splits)
    loaded = load_base_model(config, place_on(config.mesh, config.microbatch).base)
    training = make_training(config, loaded, initial)
    evaluator = training.evaluator(splits)
    _print_run(config, training)
    with Saver(config, run, training, resume=resume) as saver, preemption() as stop:
        resumed = saver.resumed
        state, start = saver.restore(training.state) if resumed else (training.state, 0)
        with RunLog(config, run, training, start, resumed=resumed) as log:
            # ---- before
            before = None
            if answers_tests(config, splits):
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
                with log.timed(done):
                    state, metrics = training.step(state, training.batch(done - 1))
                    values = to_floats(metrics)
                values |= guard.examine(done, values)
                log.step(done, state, values, skipped=guard.skipped)
                if skipped := guard.check(done, values, saver.last_good):
                    log.note(skipped)

                # ---- evaluation and checkpoint
                improved = False
                if _evaluation_due(config, done, training.steps):
                    validation = evaluator.validate(training.answering(state))
                    log.evaluation(done, validation)
                    values |= validation.results
                    improved = early.update(validation.results[config.select_by])
                asked = stop.requested(done)
                if saver.due(done) or asked or early.should_stop or (improved and config.patience):
                    saver.save(done, state, values)
                if asked and done < training.steps:
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

    return conclude(run, training, evaluator, state, before, log.timer)


def _steps(start: int, steps: int, early: EarlyStopping) -> Iterator[int]:
    """The steps that are left, counted from 1, until early stopping ends them."""
    for done in range(start + 1, steps + 1):
        if early.should_stop:
            return
        yield done


def _evaluation_due(config: TrainConfig, done: int, steps: int) -> bool:
    return config.evaluate_every > 0 and (done % config.evaluate_every == 0 or done == steps)


def _open(config: TrainConfig, held: ExitStack) -> tuple[RunFolder, bool]:
    """Lock the run's folder, and start or resume the run; once for all processes, which must all see the folder.

    Returns:
        The folder, and whether its run is resumed.
    """
    run = RunFolder(Path(config.out))

    def begin() -> bool:
        resume = config.resume or (config.auto_resume and run.begun)
        if resume and not run.config.exists():
            open_run(run.folder, config.to_json(), resume=True)  # says what is wrong
        held.enter_context(locked(run.folder))
        if config.checkpoints is not None and (elsewhere := local_folder(config.checkpoints)) is not None:
            held.enter_context(locked(elsewhere))
        open_run(run.folder, config.to_json(), resume=resume)
        return resume

    resume = on_first(begin)
    if not run.config.exists():
        raise ValueError(
            f"{run.folder}: process {jax.process_index()} does not see the folder that process 0 has made; "
            "with several hosts --out must be on a file system that all of them share"
        )
    return run, resume


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
    print_facts(
        {
            "device": device_summary(),
            **sharding,
            "model": f"{config.model}, {training.total:,} parameters",
            "training": f"{', '.join(config.plan) or 'the base'}: {training.trainable:,} parameters",
            "data": f"{training.report}; rows {100 * training.data.fill:.1f} % real tokens",
        }
    )


def main() -> None:
    """Run a config and print what came out."""
    config = from_command_line("sft", "Train steering, LoRA or a whole model on prompts and completions.", TrainConfig)
    join(config.distributed)
    result = train(config)
    if result is None:
        raise SystemExit(TO_BE_RESUMED)
    print_result(result)


if __name__ == "__main__":
    run_main(main)
