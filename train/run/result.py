"""The result of a run: what is saved, printed and drawn of it."""

from __future__ import annotations

import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.markup import escape
from rich.table import Table

from jaxsteer.io import save_hf, save_steering
from jaxsteer.io.files import write_json
from jaxsteer.orthogonality import chance_overlap
from jaxsteer.params import Params
from jaxsteer.training import TrainState
from jaxsteer.types import Steering
from train.config import TrainConfig
from train.data import Example
from train.devices.machine import peak_memory_bytes
from train.devices.processes import fetch, is_first
from train.display.console import get_console, print_facts
from train.display.plots import plot_overlap, plot_training
from train.evaluation.answers import ScoredAnswer, accuracy_of
from train.evaluation.evaluator import Evaluator
from train.run.folder import RunFolder
from train.run.metrics import read_metrics
from train.run.training import Training
from train.run.watch import StepTimer
from train.tasks.scoring import percent


@dataclass(frozen=True)
class Result:
    """The result of a run.

    run            its folder
    params         the trained trees
    before, after  test answers of the pretrained and of the trained model
    trainable, total  number of trained parameters, and of base parameters
    seconds        spent in training steps, compilation included
    tokens_per_second  real tokens, after the first step
    peak_memory    bytes
    example        a test question, without its template
    """

    run: RunFolder
    params: Params
    before: list[ScoredAnswer]
    after: list[ScoredAnswer]
    trainable: int
    total: int
    seconds: float
    tokens_per_second: float
    peak_memory: int
    example: str

    def summary(self) -> dict[str, Any]:
        """Contents of summary.json: shares from 0 to 1, bytes, seconds."""

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
            "tokens_per_second": self.tokens_per_second,
            "peak_memory_bytes": self.peak_memory,
        }


def conclude(
    run: RunFolder,
    training: Training,
    evaluator: Evaluator,
    state: TrainState,
    before: list[ScoredAnswer],
    timer: StepTimer,
) -> Result:
    """Save what was trained, evaluate it, and write the summary and the plots.

    Args:
        run: the run's folder.
        training, evaluator: its parts.
        state: the state to keep.
        before: test answers of the pretrained model.
        timer: of its steps.
    """
    config = training.config
    steering = _save_trained(run, training, state)
    after = evaluator.answer("test", training.answering(state), run.answers_after, title="Evaluating after", reuse=True)
    questions = evaluator.examples("test")
    result = Result(
        run=run,
        params=training.params(state),
        before=before,
        after=after,
        trainable=training.trainable,
        total=training.total,
        seconds=timer.seconds,
        tokens_per_second=timer.tokens_per_second,
        peak_memory=peak_memory_bytes(),
        example=question_of(questions[-1], config.task.template) if questions else "",
    )
    if is_first():
        write_json(run.summary, result.summary())
        _draw(training, result, steering)
    return result


def _save_trained(run: RunFolder, training: Training, state: TrainState) -> Steering:
    """Write the steering file, and the model if the base trained. Returns the steering on the host."""
    config, loaded, plan = training.config, training.loaded, training.program.model.plan
    params = training.params(state)
    steering = fetch(params.steering)
    if plan and is_first():
        notes = notes_of(config)
        save_steering(run.steering, steering, plan, model_name=config.model, config=loaded.config, notes=notes)
    if config.train_base:
        base = fetch(params.base)
        if is_first():
            save_hf(run.folder / "model", loaded.config, base, loaded.family, loaded.tokenizer)
    return steering


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


def question_of(example: Example, template: str) -> str:
    """What a person would type: a conversation's first question, not its system message, or a prompt."""
    asked = next((turn.text for turn in example.turns if turn.role in ("user", "prompt")), "")
    return bare(asked, template)


def suggestion(steering: Path, prompt: str) -> str:
    """The command that answers a prompt with a steering file, as a shell reads it."""
    words = [sys.executable, "-m", "train.generate", str(steering), "--compare"]
    return shlex.join([*words, *(["--"] if prompt.startswith("-") else []), prompt])


def bare(prompt: str, template: str) -> str:
    """A prompt without its template: what a person would type."""
    before, _, after = template.partition("{prompt}")
    return prompt.removeprefix(before).removesuffix(after)


def notes_of(config: TrainConfig) -> dict[str, Any]:
    """Notes for the steering file: how to ask a model that is steered with it, and how it was trained."""
    task = config.task
    return {
        "template": task.template,
        "chat": task.chat,
        "max_new_tokens": task.max_new_tokens,
        "config": config.to_json(),
    }


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
    share = 100 * result.trainable / result.total
    table.add_row("trainable parameters", f"{result.trainable:,} ({share:.2f} % of {result.total:,})")
    table.add_row("training time", f"{result.seconds:.0f} s")
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
    if run.steering.exists() and result.after and result.example:
        out.print("\nAnswer a new problem with it:", highlight=False)
        out.print(f"  {suggestion(run.steering, result.example)}", markup=False, highlight=False, soft_wrap=True)
