"""What comes out of a run, and the files that keep it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from jaxsteer.io.files import write_json
from jaxsteer.optim import Params
from jaxsteer.orthogonality import chance_overlap
from jaxsteer.types import Steering
from train.config import TrainConfig
from train.display.plots import plot_overlap, plot_training
from train.evaluation.answers import Decoded, accuracy_of, write_answers
from train.metrics import read_metrics
from train.run_folder import RunFolder
from train.setup import Training


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
