"""Supervised fine-tuning: `python -m train.sft configs/listops_smollm2.py --optim.lr 3e-3`.

Evaluates the untouched model, trains what the plan says, evaluates again, and leaves a folder with the config, the
metrics, checkpoints, a portable steering file, the answers before and after, a plot and a summary.
"""

from __future__ import annotations

import json
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxsteer.io import LoadedModel, fingerprint, save_hf, save_steering
from jaxsteer.plans import plan_to_json
from jaxsteer.types import Steering
from train.cli import from_command_line, run_main
from train.config import TO_BE_RESUMED, TrainConfig
from train.devices.machine import device_summary, enable_compilation_cache, peak_flops, peak_memory_bytes
from train.devices.placement import place_on
from train.devices.processes import fetch, is_first, join, on_first
from train.display.console import get_console, print_facts, progress
from train.evaluation.answers import Decoded, Prompts, accuracy_of, decode, make_prompts, read_answers, write_answers
from train.run.checkpoints import Checkpoints, local_folder, open_checkpoints
from train.run.folder import RunFolder, differences, locked, open_run
from train.run.metrics import MetricsWriter, read_metrics
from train.run.preemption import preemption
from train.run.profiling import Profiler
from train.run.result import Result, bare, notes_of, print_result, write_outcome
from train.run.trackers import check_trackers, open_trackers
from train.run.training import Training, load_base_model, make_training, to_floats
from train.run.watch import Speed, describe, is_finite, patience_after, sources
from train.tasks.scoring import Accuracy


def train(config: TrainConfig, initial: Steering | None = None) -> Result | None:
    """Carry out a run. None where it was asked to stop early (SIGTERM, Ctrl-C): it is saved and can be resumed.

    Args:
        config: the run.
        initial: steering to start from, of the config's plan; by default it is drawn from the seed.

    Raises:
        ValueError: bad settings or data, each before anything is trained; an output folder that holds another run.
        FloatingPointError: the loss is not finite; the last good checkpoint is kept.
    """
    check_trackers(config.track)
    with ExitStack() as held:
        run, resume = _open(config, held)
        return _train(replace(config, resume=resume), run, initial)


def _train(config: TrainConfig, run: RunFolder, initial: Steering | None) -> Result | None:
    enable_compilation_cache()

    # ---- base model, data, what trains
    loaded = load_base_model(config, place_on(config.mesh, config.batch_size // config.grad_accumulation).base)
    training = make_training(config, loaded)
    training = training if initial is None else training.starting_from(initial)
    state = training.state
    print_facts(
        {
            "device": device_summary(),
            **_spread(training),
            "model": f"{config.model}, {training.total:,} parameters",
            "training": f"{', '.join(config.plan) or 'the base'}: {training.trainable:,} parameters",
            "data": f"{training.report}; rows {100 * training.data.fill:.1f} % real tokens",
        }
    )

    # ---- checkpoints
    meta = {
        "plan": plan_to_json(training.model.plan),
        "model": config.model,
        "fingerprint": fingerprint(loaded.config),
        "config": json.loads(json.dumps(config.to_json())),
    }
    checkpoints = open_checkpoints(
        config.checkpoints or run.checkpoints,
        every=config.checkpoint_every,
        best_metric="accuracy" if config.evaluate_every else "loss",
        best_mode="max" if config.evaluate_every else "min",
    )
    with checkpoints, preemption() as stop:
        resume = config.resume or _left(config, checkpoints)
        state, start = _resume(checkpoints, state, meta) if resume else (state, 0)
        resume_at = (start or -1) if resume else None
        profiler = Profiler(config.profile, run.profile, start, training.steps)
        shown_at = config.track if is_first() else ()
        trackers = open_trackers(shown_at, run.folder, config.to_json(), resume_at=resume_at)
        metrics_path = run.metrics if is_first() else None
        with profiler, MetricsWriter(metrics_path, resume_at=resume_at, trackers=trackers) as writer:
            # ---- before
            validation = _prompts(config, loaded, "validation", config.validation_examples)
            test = _prompts(config, loaded, "test", config.test_examples)
            before = _before(config, run, training, loaded, test)
            if start == 0 and validation and config.evaluate_every:
                _validate(config, training, loaded, training.state, validation, writer, 0, untouched=True)

            # ---- loop
            rows = read_metrics(run.metrics) if start and run.metrics.exists() else []
            patience = patience_after(config.patience, (r["accuracy"] for r in rows if r["step"] and "accuracy" in r))
            step_fn, skipped = training.step, on_first(lambda: _skipped(run))
            peak = peak_flops(training.program.mesh, loaded.base["embed"]["embedding"].dtype)
            speed = Speed(lambda supervised: training.flops(config, supervised), peak)
            with progress(training.steps, "Training", start=start) as bar:
                for step in range(start, start if patience.over else training.steps):
                    profiler.before(step + 1)
                    batch = training.batch(config, step)
                    state, metrics = step_fn(state, batch, training.frozen)
                    done, values = step + 1, to_floats(metrics)
                    rates = speed.step(values)
                    finite = is_finite(values)
                    if not finite:
                        values["examples"] = sources(training.data, step)
                        skipped += config.nonfinite == "skip"
                    counted = {"skipped": skipped} if skipped else {}
                    writer.write(done, **values, **rates, **counted)
                    if not finite:
                        happened = describe(done, values, values["examples"])
                        if config.nonfinite == "stop" or skipped > config.max_skipped:
                            checkpoints.wait()
                            raise FloatingPointError(_stopped(config, happened, checkpoints))
                        bar.note(f"Skipped {happened}.")
                    bar.update(done, **_facts(values, rates), **counted)
                    if traced := profiler.after(done, state):
                        bar.note(traced)

                    # ---- evaluation and checkpoint
                    with speed.pause():
                        last = done == training.steps
                        measured: dict[str, float] = {}
                        best = False
                        if validation and config.evaluate_every and (done % config.evaluate_every == 0 or last):
                            found = _validate(config, training, loaded, state, validation, writer, done)
                            bar.note(f"step {done}: validation accuracy {found}")
                            measured["accuracy"] = found.rate
                            best = patience.hear(found.rate) and config.patience > 0
                        elif not config.evaluate_every:
                            measured["loss"] = values["loss"]
                        stopping = stop.requested(done)
                        if done % config.checkpoint_every == 0 or last or stopping or best or patience.over:
                            checkpoints.save(done, _trees(state), meta, measured, force=True)
                    if stopping and not last:
                        checkpoints.wait()
                        bar.note(f"Asked to stop: saved at step {done}. Add --resume to go on.")
                        return None
                    if patience.over:
                        bar.note(f"Step {done}: no better accuracy in {config.patience} evaluations; training ends.")
                        break
            if patience.over and (kept := checkpoints.restore_best(_trees(state))) is not None:
                state = _from(kept.trees, state)
                get_console().print(f"Kept: step {kept.step}, the best of the validation.", highlight=False)
            if skipped:
                get_console().print(
                    f"{skipped} steps were skipped: the lines of {run.metrics} with 'examples' say which."
                )

    # ---- what is kept
    params = training.params(state)
    steering = fetch(params.steering)
    if training.model.plan and is_first():
        save_steering(
            run.steering,
            steering,
            training.model.plan,
            model_name=config.model,
            config=loaded.config,
            notes=notes_of(config),
        )
    if config.train_base:
        base = fetch(params.base)
        if is_first():
            save_hf(run.folder / "model", loaded.config, base, loaded.family, loaded.tokenizer)

    # ---- after
    after = _answer(config, training, loaded, params.base, params.steering, test, "Evaluating after")
    example = config.task.load("test")[-1].turns[0].text if test else ""
    example = bare(example, config.task.template)
    result = Result(
        run,
        params,
        before,
        after,
        training.trainable,
        training.total,
        speed.seconds,
        speed.tokens_per_second,
        peak_memory_bytes(),
        example,
    )
    if is_first():
        write_outcome(config, training, result, steering)
    return result


def _open(config: TrainConfig, held: ExitStack) -> tuple[RunFolder, bool]:
    """Lock the run's folder, and begin or resume it, once for all processes, which must all see it.

    Returns:
        The folder, and whether its run is resumed.
    """
    run = RunFolder(Path(config.out))

    def begin() -> bool:
        resume = config.resume or (config.auto_resume and run.begun)
        if resume and not run.config.exists():
            open_run(run.folder, config.to_json(), resume=True)  # says what is wrong
        held.enter_context(locked(run.folder))
        if config.checkpoints is not None and (away := local_folder(config.checkpoints)) is not None:
            held.enter_context(locked(away))
        open_run(run.folder, config.to_json(), resume=resume)
        return resume

    resume = on_first(begin)
    if not run.config.exists():
        raise ValueError(
            f"{run.folder}: process {jax.process_index()} does not see the folder that process 0 has made; "
            "with several hosts --out must lie on a file system that all of them share"
        )
    return run, resume


def _facts(values: dict[str, Any], rates: dict[str, float]) -> dict[str, float]:
    """What the status line shows of a step."""
    overlap = {"overlap": float(np.mean(values["overlap"]))} if "overlap" in values else {}
    shown = {name: rate for name, rate in rates.items() if name != "step_seconds"}
    return {"loss": values["loss"], "grad_norm": values["grad_norm"], **overlap, **shown}


def _skipped(run: RunFolder) -> int:
    """Steps skipped before the run was resumed."""
    return max((row.get("skipped", 0) for row in read_metrics(run.metrics)), default=0)


def _stopped(config: TrainConfig, happened: str, checkpoints: Checkpoints) -> str:
    """Why a run stops at a step that is not finite, and what can be done."""
    limit = f" That is one more than --max-skipped {config.max_skipped} allows." * (config.nonfinite == "skip")
    return (
        f"{happened}.{limit} Stopped; the last good checkpoint is step "
        f"{max(checkpoints.steps(), default='none')} in {checkpoints.folder}. A lower --optim.lr or a smaller "
        "--optim.clip usually helps; --resume --nonfinite skip goes on without such steps."
    )


def _spread(training: Training) -> dict[str, str]:
    """The mesh and the attention kernel, for people; nothing on a single CPU device."""
    mesh, (kernel, reason) = training.program.mesh, training.program.attention
    if mesh is None:
        return {} if kernel == "rows" else {"attention": f"{kernel}: {reason}"}
    sizes = " x ".join(f"{name} {size}" for name, size in mesh.shape.items())
    idle = f" ({mesh.size} of {jax.device_count()} devices)" if mesh.size < jax.device_count() else ""
    return {"mesh": f"{sizes}{idle}", "attention": f"{kernel}: {reason}"}


def _left(config: TrainConfig, checkpoints: Checkpoints) -> bool:
    """Whether to go on from checkpoints that outlived the run's folder: those of another machine, in a bucket.

    Raises:
        ValueError: there are some, but nothing said to resume.
    """
    steps = checkpoints.steps()
    if steps and not config.auto_resume:
        raise ValueError(
            f"{checkpoints.folder}: holds checkpoints already, the last of step {steps[-1]}, but {config.out} holds no "
            "run. --auto-resume goes on from there; else use another --checkpoints"
        )
    return bool(steps)


def _resume(checkpoints: Checkpoints, state: Any, meta: dict[str, Any]) -> tuple[Any, int]:
    """The newest good checkpoint's state and step; the fresh state and 0 where nothing was saved yet."""
    restored = checkpoints.restore_latest(_trees(state))
    if restored is None:
        get_console().print("Nothing was saved yet: starting from step 0.")
        return state, 0
    for message in restored.skipped:
        get_console().print(message, markup=False, highlight=False, soft_wrap=True)
    if differing := differences(restored.meta, meta):
        raise ValueError(f"{checkpoints.folder}: was saved with other settings: {'; '.join(differing)}")
    get_console().print(f"Restored step {restored.step}.", highlight=False)
    return _from(restored.trees, state), restored.step


def _from(trees: dict[str, Any], state: Any) -> Any:
    """A state of the parts that `_trees` gives."""
    params = state.params._replace(base=trees["base"], steering=trees["steering"])
    return state._replace(params=params, opt_state=trees["optimizer"], **trees["progress"])


def _trees(state: Any) -> dict[str, Any]:
    """The parts of a state, each an item of its own in a checkpoint."""
    return {
        "steering": state.params.steering,
        "base": state.params.base,
        "optimizer": state.opt_state,
        "progress": {"step": state.step, "key": state.key},
    }


def _prompts(config: TrainConfig, loaded: LoadedModel, split: Any, limit: int) -> Prompts | None:
    examples = config.task.load(split)[:limit] if limit else []
    return make_prompts(examples, loaded.tokenizer, loaded.stop_tokens, config.task) if examples else None


def _answer(
    config: TrainConfig,
    training: Training,
    loaded: LoadedModel,
    base: Any,
    steering: Any,
    prompts: Prompts | None,
    title: str | None = None,
) -> list[Decoded]:
    if prompts is None:
        return []
    run = lambda advance: decode(
        training.model,
        base,
        steering,
        prompts,
        loaded.tokenizer,
        batch_size=config.eval_batch_size,
        advance=advance,
        place=training.program.placement.batch,
    )
    with training.program.on_mesh():
        if title is None:
            return run(lambda done: None)
        with progress(len(prompts.tokens), title) as bar:
            return run(lambda done: bar.update(done))


def _before(
    config: TrainConfig, run: RunFolder, training: Training, loaded: LoadedModel, test: Prompts | None
) -> list[Decoded]:
    """Answers of the untouched model; those of the first start where the run was resumed."""
    path = run.folder / "answers_before.jsonl"
    if on_first(path.exists):
        return read_answers(path)
    # Zeros are the identity for every method, so the steered program answers for the untouched model.
    untouched = jax.tree.map(jnp.zeros_like, training.params(training.state).steering)
    before = _answer(config, training, loaded, loaded.base, untouched, test, "Evaluating before")
    if is_first():
        write_answers(path, before)
    return before


def _validate(
    config: TrainConfig,
    training: Training,
    loaded: LoadedModel,
    state: Any,
    prompts: Prompts,
    writer: MetricsWriter,
    step: int,
    *,
    untouched: bool = False,
) -> Accuracy:
    params = training.params(state)
    steering = jax.tree.map(jnp.zeros_like, params.steering) if untouched else params.steering
    found = accuracy_of(_answer(config, training, loaded, params.base, steering, prompts))
    low, high = found.interval
    writer.write(step, accuracy=found.rate, low=low, high=high)
    return found


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
