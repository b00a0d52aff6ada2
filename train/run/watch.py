"""How fast a run trains: clocks that leave out the compilation, evaluations and checkpoints."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from train.data import DataSource


class Speed:
    """The clocks of a run. Begins when it is made.

    Args:
        flops: useful floating-point operations of a step, by its number of supervised tokens.
        peak: of the devices together, FLOP/s; None where it is not known.
    """

    def __init__(self, flops: Callable[[float], float], peak: float | None) -> None:
        self._flops, self._peak = flops, peak
        self._began = self._step_began = time.perf_counter()
        self._compiled_at: float | None = None
        self._ended = self._began
        self._tokens = 0.0  # of the steps after the first

    def step(self, values: Mapping[str, float]) -> dict[str, float]:
        """The rates after a step: tokens_per_second of the run so far, step_seconds, and mfu where the peak is known.

        The first step compiles: it has no mfu, and counts for the speed only until there is a second.

        Args:
            values: its tokens and supervised tokens.
        """
        now = self._ended = time.perf_counter()
        seconds = now - self._step_began
        if self._compiled_at is None:
            self._compiled_at = now
            return {"tokens_per_second": values["tokens"] / (now - self._began), "step_seconds": seconds}
        self._tokens += values["tokens"]
        rates = {"tokens_per_second": self.tokens_per_second, "step_seconds": seconds}
        if self._peak:
            rates["mfu"] = self._flops(values["supervised"]) / (seconds * self._peak)
        self._step_began = now
        return rates

    @contextmanager
    def pause(self) -> Iterator[None]:
        """What happens inside does not count; the next step begins after it."""
        paused = time.perf_counter()
        yield
        self._step_began = time.perf_counter()
        lost = self._step_began - paused
        self._began, self._ended = self._began + lost, self._ended + lost
        if self._compiled_at is not None:
            self._compiled_at += lost

    @property
    def seconds(self) -> float:
        """Spent in training, compilation included."""
        return self._ended - self._began

    @property
    def tokens_per_second(self) -> float:
        """Real tokens a second after the first step; 0 before there is a second."""
        return (
            0.0 if self._compiled_at is None or not self._tokens else self._tokens / (self._ended - self._compiled_at)
        )


def is_finite(values: Mapping[str, Any]) -> bool:
    """Whether a step's loss, penalty and gradient are finite: what `train_step` decides a skip by."""
    return bool(np.isfinite([values["loss"], values["penalty"], values["grad_norm"]]).all())


def sources(data: DataSource, step: int) -> list[list[str]]:
    """For each row of a step's batch, where its examples came from ("file:line"). step: from 0."""
    return [[data.examples[index].source for index in row] for row in data.row_members(step)]


def describe(step: int, values: Mapping[str, Any], rows: list[list[str]]) -> str:
    """What happened at a step (from 1), and the first examples of its batch."""
    shown = "; ".join(
        f"row {row}: {', '.join(members[:3])}{', ...' * (len(members) > 3)}"
        for row, members in list(enumerate(rows))[:4]
    )
    more = "; ..." if len(rows) > 4 else ""
    return (
        f"step {step}: the loss is {values['loss']}, the penalty {values['penalty']}, the gradient's norm "
        f"{values['grad_norm']}. Its batch held {shown}{more} (all of it: 'examples' of that step in metrics.jsonl)"
    )


@dataclass
class Patience:
    """Counts evaluations in a row that were not better than the best before.

    limit  of them; 0 = without end
    """

    limit: int
    best: float = float("-inf")
    waited: int = 0

    def hear(self, accuracy: float) -> bool:
        """Take note of an evaluation; whether it is the best so far."""
        better = accuracy > self.best
        self.best, self.waited = (accuracy, 0) if better else (self.best, self.waited + 1)
        return better

    @property
    def over(self) -> bool:
        """Whether the run is to end."""
        return 0 < self.limit <= self.waited


def patience_after(limit: int, accuracies: Iterable[float]) -> Patience:
    """The patience that is left after earlier evaluations."""
    patience = Patience(limit)
    for accuracy in accuracies:
        patience.hear(accuracy)
    return patience
