"""What comes out of a run, and the files that keep it."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

import numpy as np
from rich.markup import escape
from rich.table import Table

from jaxsteer.io.files import write_json
from jaxsteer.orthogonality import chance_overlap
from jaxsteer.params import Params
from jaxsteer.types import Steering
from train.config import TrainConfig
from train.display.console import get_console, print_facts
from train.display.plots import plot_overlap, plot_training
from train.evaluation.answers import Decoded, accuracy_of, write_answers
from train.run.folder import RunFolder
from train.run.metrics import read_metrics
from train.run.training import Training
from train.tasks.scoring import percent


@dataclass(frozen=True)
class Result:
    """What came out of a run. seconds and tokens_per_second are of the training alone, the latter after compilation."""

    run: RunFolder
    params: Params
    before: list[Decoded]
    after: list[Decoded]
    trainable: int
    total: int
    seconds: float
    tokens_per_second: float
    peak_memory: int
    example: str

    def summary(self) -> dict[str, Any]:
        """For summary.json: shares from 0 to 1, bytes, seconds."""

        def rate(decoded: list[Decoded]) -> dict[str, Any] | None:
            if not decoded:
                return None
            found = accuracy_of(decoded)
            return {"value": found.rate, "interval": list(found.interval), "examples": found.total}

        return {
            "accuracy_before": rate(self.before),
            "accuracy_after": rate(self.after),
            "trainable_parameters": self.trainable,
            "trainable_share": self.trainable / self.total,
            "seconds": self.seconds,
            "tokens_per_second": self.tokens_per_second,
            "peak_memory_bytes": self.peak_memory,
        }


def write_outcome(config: TrainConfig, training: Training, result: Result, steering: Steering) -> None:
    """Answers, summary and plots of a finished run."""
    run, after = result.run, result.after
    write_answers(run.folder / "answers_after.jsonl", after)
    write_json(run.summary, result.summary())
    rows = read_metrics(run.metrics)
    evaluations = [(r["step"], r["accuracy"], r["low"], r["high"]) for r in rows if "accuracy" in r]
    if after:
        found = accuracy_of(after)
        evaluations = evaluations or [(training.steps, found.rate, *found.interval)]
    title = f"{config.model}: {', '.join(config.plan) or 'base'}"
    plot_training(rows, run.plot, evaluations=evaluations, title=title)
    if shared := [(row["step"], row["overlap"]) for row in rows if row.get("overlap")]:
        chance = chance_overlap(training.model.plan, steering, training.orthogonality)
        steps, overlaps = zip(*shared, strict=True)
        plot_overlap(run.folder / "overlap.png", steps, np.array(overlaps), chance=chance, title=title)


def bare(prompt: str, template: str) -> str:
    """What a person typed of a prompt: the template taken off."""
    before, _, after = template.partition("{prompt}")
    return prompt.removeprefix(before).removesuffix(after)


def notes_of(config: TrainConfig) -> dict[str, Any]:
    """How the steering was trained to be asked, for whoever loads the file."""
    task = config.task
    return {
        "template": task.template,
        "chat": task.chat,
        "max_new_tokens": task.max_new_tokens,
        "config": config.to_json(),
    }


SHOWN = 3
"""Problems whose answers are printed."""


def print_result(result: Any) -> None:
    """The table of a finished run, a few answers before and after, and where everything lies."""
    out = get_console()
    table = Table(title="Result", title_justify="left", show_header=False)
    for name, decoded in (("before", result.before), ("after", result.after)):
        if decoded:
            found = accuracy_of(decoded)
            table.add_row(f"accuracy {name} (95 %)", f"{percent(found)} of {found.total} held-out problems")
    share = 100 * result.trainable / result.total
    table.add_row("trainable parameters", f"{result.trainable:,} ({share:.2f} % of {result.total:,})")
    table.add_row("training time", f"{result.seconds:.0f} s")
    table.add_row("speed", f"{result.tokens_per_second:,.0f} tokens/s")
    table.add_row("peak memory", f"{result.peak_memory / 1e9:.2f} GB")
    out.print(table)

    answers = Table(title="Answers before and after", title_justify="left", show_lines=True)
    for column in ("prompt", "before", "after", "right answer"):
        answers.add_column(column)
    for before, after in _telling(result.before, result.after):
        answers.add_row(*(escape(text) for text in (before.prompt, before.output, after.output, str(before.gold))))
    if answers.row_count:
        out.print(answers)

    run = result.run
    places = {"checkpoints": run.checkpoints, "curves": run.plot, "metrics": run.metrics, "summary": run.summary}
    if run.steering.exists():
        places = {"steering": run.steering, **places}
    print_facts({name: str(path) for name, path in places.items()})
    if run.steering.exists() and result.after:
        out.print("\nAnswer a new problem with it:", highlight=False)
        command = f"  {sys.executable} -m train.generate {run.steering} '{result.example}' --compare"
        out.print(command, markup=False, highlight=False, soft_wrap=True)


def _telling(before: list[Decoded], after: list[Decoded]) -> list[tuple[Decoded, Decoded]]:
    """The first few problems, as they come: a choice would flatter."""
    return list(zip(before, after, strict=True))[:SHOWN]
