"""The result of a run: what is saved, printed and drawn of it."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, TypedDict

import numpy as np
from rich.markup import escape
from rich.table import Table

from jaxsteer.io import sample_weights, save_hf, save_steering
from jaxsteer.io.files import write_json
from jaxsteer.io.provenance import library_version
from jaxsteer.orthogonality import chance_overlap
from jaxsteer.params import Params
from jaxsteer.training import TrainState
from jaxsteer.types import Steering
from train.base_models import MODEL_NOTES
from train.config import TrainConfig
from train.data import Example
from train.devices.machine import peak_memory_bytes
from train.devices.processes import fetch, is_first, on_first
from train.display.console import get_console, print_facts
from train.display.plots import plot_overlap, plot_training
from train.evaluation.answers import ScoredAnswer, accuracy_of
from train.evaluation.evaluator import Evaluator, figures_of
from train.run.figures import FIGURES, changes, without_split
from train.run.folder import RunFolder, now, read_history, read_inputs
from train.run.metrics import read_metrics
from train.run.training import Training
from train.run.watch import StepTimer
from train.tasks import typed_template
from train.tasks.scoring import percent


class BeforeAfter(TypedDict, total=False):
    """Figures of the pretrained and the trained model, by the names of `train.run.figures`."""

    before: dict[str, float]
    after: dict[str, float]


class Question(NamedTuple):
    """A question as a person would type it, and the system message that it is asked under, if any."""

    prompt: str
    system: str | None = None


@dataclass(frozen=True)
class Result:
    """The result of a run.

    run            its folder
    params         the trained trees
    before, after  test answers of the pretrained and of the trained model; none for free text
    losses         what `BeforeAfter` says of the loss: "test" for free text, "validation" where there were evaluations
    trainable, total  number of trained parameters, and of base parameters
    seconds        spent in training steps, compilation included
    data_wait      seconds of it that steps waited for their batch
    tokens_per_second  real tokens, after the first step
    peak_memory    bytes
    question       a test question
    step           whose state is kept, counted from 1
    """

    run: RunFolder
    params: Params
    before: list[ScoredAnswer]
    after: list[ScoredAnswer]
    trainable: int
    total: int
    seconds: float
    data_wait: float
    tokens_per_second: float
    peak_memory: int
    question: Question
    losses: Mapping[str, BeforeAfter] = field(default_factory=dict)
    step: int = 0

    def summary(self) -> dict[str, Any]:
        """Contents of summary.json: shares from 0 to 1, bytes, seconds; the time is that of this call."""

        def rate(answers: list[ScoredAnswer]) -> dict[str, Any] | None:
            if not answers:
                return None
            result = accuracy_of(answers)
            return {"value": result.rate, "interval": list(result.interval), "examples": result.total}

        return {
            "accuracy_before": rate(self.before),
            "accuracy_after": rate(self.after),
            "trainable_parameters": self.trainable,
            "trainable_share": self.trainable / self.total,
            "seconds": self.seconds,
            "data_wait_seconds": self.data_wait,
            "tokens_per_second": self.tokens_per_second,
            "peak_memory_bytes": self.peak_memory,
            "step": self.step,
            "finished": now(),
            **{name: figures for name, figures in self.losses.items() if figures},
        }


def conclude(
    run: RunFolder,
    training: Training,
    evaluator: Evaluator,
    state: TrainState,
    before: list[ScoredAnswer] | None,
    timer: StepTimer,
) -> Result:
    """Save what was trained, evaluate it, and write the summary and the plots.

    Args:
        run: the run's folder.
        training, evaluator: its parts.
        state: the state to keep.
        before: test answers of the pretrained model; None to measure the loss of the reference completions instead.
        timer: of its steps.
    """
    config = training.config
    steering = _save_trained(run, training, state)
    questions, tuned, after, losses = evaluator.examples("test"), training.answering(state), [], {}
    if before is not None:
        after = evaluator.answer("test", tuned, run.answers_after, title="Evaluating after", reuse=True)
    if figures := _tested(evaluator, [training.untouched(), tuned], loss=before is None):
        losses["test"] = BeforeAfter(before=figures[0], after=figures[1])
    if config.evaluate_every:
        losses["validation"] = on_first(lambda: _validated(run, int(state.step)))
    result = Result(
        run=run,
        params=training.params(state),
        before=before or [],
        after=after,
        losses=losses,
        trainable=training.trainable,
        total=training.total,
        seconds=timer.seconds,
        data_wait=timer.waited,
        tokens_per_second=timer.tokens_per_second,
        peak_memory=peak_memory_bytes(),
        question=question_of(questions[-1], typed_template(config.task)) if questions else Question(""),
        step=int(state.step),
    )
    if is_first():
        write_json(run.summary, result.summary())
        _draw(training, result, steering)
    return result


def _tested(evaluator: Evaluator, models: Sequence[Params], *, loss: bool) -> list[dict[str, float]]:
    """The figures of some models on the test split, with the loss if asked for; [] if there are none."""
    if not evaluator.examples("test"):
        return []
    losses = (figures_of(evaluator.loss("test", params)) if loss else {} for params in models)
    found = [without_split(figures) for figures in losses]
    found = [{**figures, **evaluator.measure("test", params)} for figures, params in zip(found, models, strict=True)]
    return found if any(found) else []


def _validated(run: RunFolder, step: int) -> BeforeAfter:
    """The evaluations of the pretrained model and of the state that is kept, of this step, from the run's metrics."""
    rows = {
        row["step"]: {name: value for name, value in without_split(row).items() if name in FIGURES}
        for row in read_metrics(run.metrics)
        if "validation_loss" in row
    }
    found: BeforeAfter = {}
    if rows.get(0):
        found["before"] = rows[0]
    if rows.get(step):
        found["after"] = rows[step]
    return found


def _save_trained(run: RunFolder, training: Training, state: TrainState) -> Steering:
    """Write the steering file, and the model if the base trained. Returns the steering on the host."""
    config, loaded, plan = training.config, training.loaded, training.program.model.plan
    params = training.params(state)
    steering = fetch(params.steering)
    name, sample = config.model, loaded.sample
    if config.train_base:
        base = fetch(params.base)
        if is_first():
            model = run.folder / "model"
            save_hf(model, loaded.config, base, loaded.family, loaded.tokenizer, generation=loaded.generation)
            write_json(model / MODEL_NOTES, _model_notes(run, training))
            # Steering trained together with the base belongs to what the base became.
            name, sample = str(model), sample_weights(model)
    if plan and is_first():
        notes = notes_of(config) | provenance(run)
        save_steering(run.steering, steering, plan, model_name=name, config=loaded.config, notes=notes, sample=sample)
    return steering


def _model_notes(run: RunFolder, training: Training) -> dict[str, Any]:
    """How a fully fine-tuned model came about, for a file beside its weights: from which base, on what, with what."""
    config, sample = training.config, training.loaded.sample
    digest = None if sample is None else sample.digest
    made = {"by": "training", "base": config.model, "base_weights": digest, "jaxsteer": library_version()}
    return made | notes_of(config) | provenance(run)


def _draw(training: Training, result: Result, steering: Steering) -> None:
    """Plot the curves of a finished run, and the overlap of a joint one."""
    run, program = result.run, training.program
    rows = read_metrics(run.metrics)
    evaluations = [(row["step"], row["accuracy"], row["low"], row["high"]) for row in rows if "accuracy" in row]
    if result.after and not evaluations:
        accuracy = accuracy_of(result.after)
        evaluations = [(training.steps, accuracy.rate, *accuracy.interval)]
    title = f"{training.config.model}: {', '.join(training.config.plan) or 'base'}"
    plot_training(rows, run.plot, evaluations=evaluations, title=title)
    if shared := [(row["step"], row["overlap"]) for row in rows if row.get("overlap")]:
        chance = chance_overlap(program.model.plan, steering, program.orthogonality)
        steps, overlaps = zip(*shared, strict=True)
        plot_overlap(run.folder / "overlap.png", steps, np.array(overlaps), chance=chance, title=title)


def question_of(example: Example, template: str) -> Question:
    """What a person would type: a conversation's first question, or a prompt without its template."""
    text = {turn.role: turn.text for turn in reversed(example.turns)}  # the first of each role
    return Question(bare(text.get("user", text.get("prompt", "")), template), text.get("system"))


def suggestion(steering: Path, question: Question) -> str:
    """The command that answers a question with a steering file, as a shell reads it."""
    words = [sys.executable, "-m", "train.generate", str(steering), "--compare"]
    if question.system is not None:
        words += [f"--system={question.system}"]
    return shlex.join([*words, *(["--"] if question.prompt.startswith("-") else []), question.prompt])


def bare(prompt: str, template: str) -> str:
    """A prompt without its template: what a person would type."""
    before, _, after = template.partition("{prompt}")
    return prompt.removeprefix(before).removesuffix(after)


def notes_of(config: TrainConfig) -> dict[str, Any]:
    """Notes for the steering file: how to ask a model that is steered with it, and how it was trained."""
    task = config.task
    return {
        "template": typed_template(task),
        "chat": task.chat,
        "max_new_tokens": task.max_new_tokens,
        "date": config.date,
        "config": config.to_json(),
    }


def provenance(run: RunFolder) -> dict[str, Any]:
    """Notes on what a run was made from: its data, the steering it started from, and settings changed on the way."""
    inputs, history = read_inputs(run), read_history(run)
    return ({"inputs": inputs} if inputs else {}) | ({"history": history} if history else {})


SHOWN = 3
"""Number of questions whose answers are printed."""


def print_result(result: Result) -> None:
    """Print the figures of a finished run, a few answers before and after, and where its files are."""
    out = get_console()
    table = Table(title="Result", title_justify="left", show_header=False)
    for name, answers in (("before", result.before), ("after", result.after)):
        if answers:
            accuracy = accuracy_of(answers)
            table.add_row(f"accuracy {name} (95 %)", f"{percent(accuracy)} of {accuracy.total} held-out problems")
    for split, figures in result.losses.items():
        stages = [stage for stage in (figures.get("before"), figures.get("after")) if stage]
        for name, text in changes(stages).items():
            table.add_row(f"{split} {name}", text)
    share = 100 * result.trainable / result.total
    table.add_row("trainable parameters", f"{result.trainable:,} ({share:.2f} % of {result.total:,})")
    waited = f", {result.data_wait:.0f} s of it waiting for data" if result.data_wait > 0.01 * result.seconds else ""
    table.add_row("training time", f"{result.seconds:.0f} s{waited}")
    table.add_row("speed", f"{result.tokens_per_second:,.0f} tokens/s")
    table.add_row("peak memory", f"{result.peak_memory / 1e9:.2f} GB")
    out.print(table)

    shown = Table(title="Answers before and after", title_justify="left", show_lines=True)
    for column in ("prompt", "before", "after", "right answer"):
        shown.add_column(column)
    for before, after in list(zip(result.before, result.after, strict=True))[:SHOWN]:
        shown.add_row(*(escape(text) for text in (before.prompt, before.output, after.output, str(before.gold))))
    if shown.row_count:
        out.print(shown)

    run = result.run
    paths = {"checkpoints": run.checkpoints, "curves": run.plot, "metrics": run.metrics, "summary": run.summary}
    if run.steering.exists():
        paths = {"steering": run.steering, **paths}
    print_facts({name: str(path) for name, path in paths.items()})
    if run.steering.exists() and result.after and result.question.prompt:
        out.print("\nAnswer a new problem with it:", highlight=False)
        out.print(f"  {suggestion(run.steering, result.question)}", markup=False, highlight=False, soft_wrap=True)
    out.print("\nA page about this run, to keep or to send:", highlight=False)
    out.print(f"  {shlex.join([sys.executable, '-m', 'train.report', str(run.folder)])}", markup=False, soft_wrap=True)
