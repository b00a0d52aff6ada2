"""What watches a training: its speed, steps that are not finite, and whether it still improves."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from train.config import TrainConfig
from train.data import StepSource


class StepTimer:
    """Wall-clock time of training steps. The first step compiles and is left out of the speed.

    Args:
        flops: useful floating-point operations of a step, given its number of supervised tokens.
        peak: peak of all devices together, FLOP/s; None if unknown.
    """

    def __init__(self, flops: Callable[[float], float], peak: float | None) -> None:
        self._flops, self._peak = flops, peak
        self._compiled = False
        self._last = self._after_first = self._tokens = 0.0
        self.seconds = 0.0
        """Time spent in steps, compilation included."""
        self.waited = 0.0
        """Part of it that was spent waiting for data."""

    @contextmanager
    def step(self) -> Iterator[None]:
        """Time one step."""
        began = time.perf_counter()
        yield
        self._last = time.perf_counter() - began
        self.seconds += self._last

    def rates(self, values: Mapping[str, float]) -> dict[str, float]:
        """Rates after a timed step: tokens_per_second so far, step_seconds, and mfu where the peak is known.

        Args:
            values: the step's metrics, with `tokens`, `supervised` and `data_wait`.
        """
        self.waited += values["data_wait"]
        if not self._compiled:
            self._compiled = True
            return {"tokens_per_second": values["tokens"] / self._last, "step_seconds": self._last}
        self._after_first += self._last
        self._tokens += values["tokens"]
        rates = {"tokens_per_second": self.tokens_per_second, "step_seconds": self._last}
        if self._peak:
            rates["mfu"] = self._flops(values["supervised"]) / (self._last * self._peak)
        return rates

    @property
    def tokens_per_second(self) -> float:
        """Real tokens per second after the first step; 0 before the second."""
        return self._tokens / self._after_first if self._after_first else 0.0


class NonfiniteGuard:
    """Stops a run at a step whose loss or gradient is not finite, or counts the steps skipped so far.

    Args:
        config: decides between stopping and skipping, and how many steps may be skipped.
        data: names the examples of a step.
        skipped: steps skipped before the run was resumed.
    """

    def __init__(self, config: TrainConfig, data: StepSource, skipped: int) -> None:
        self._config, self._data = config, data
        self.skipped = skipped

    def examine(self, done: int, values: Mapping[str, Any]) -> dict[str, Any]:
        """What to log about a step (from 1): {} if it is finite, else the sources of its batch's examples, row by row.

        A step that is to be skipped is counted.
        """
        if _is_finite(values):
            return {}
        self.skipped += self._config.nonfinite == "skip"
        return {"examples": self._data.named(done - 1)}

    def check(self, done: int, values: Mapping[str, Any], last_good: Callable[[], str]) -> str | None:
        """A message about a skipped step; None for a finite one.

        Args:
            done: the step, counted from 1.
            values: its metrics, with the examples that `examine` gave.
            last_good: gives a clause on the last good checkpoint, only called before raising.

        Raises:
            FloatingPointError: the step is not finite and may not be skipped.
        """
        if _is_finite(values):
            return None
        happened = _describe(done, values)
        if self._config.nonfinite == "skip" and self.skipped <= self._config.max_skipped:
            return f"Skipped {happened}."
        if self._config.nonfinite == "skip":
            limit = f" That is one more than --max-skipped {self._config.max_skipped} allows."
            remedy = "--resume with a larger --max-skipped continues."
        else:
            limit, remedy = "", "--resume --nonfinite skip continues without such steps."
        raise FloatingPointError(
            f"{happened}.{limit} Stopped; {last_good()}. A lower --optim.lr or a smaller --optim.clip usually helps; "
            f"{remedy}"
        )


def _is_finite(values: Mapping[str, Any]) -> bool:
    """Whether a step's loss, penalty and gradient are finite: what `train_step` decides a skip by."""
    return bool(np.isfinite([values["loss"], values["penalty"], values["grad_norm"]]).all())


def _describe(done: int, values: Mapping[str, Any]) -> str:
    """What happened at a step, and the first examples of its batch."""
    rows = values["examples"]
    shown = "; ".join(
        f"row {row}: {', '.join(members[:3])}{', ...' * (len(members) > 3)}"
        for row, members in list(enumerate(rows))[:4]
    )
    more = "; ..." if len(rows) > 4 else ""
    return (
        f"step {done}: the loss is {values['loss']}, the penalty {values['penalty']}, the gradient's norm "
        f"{values['grad_norm']}. Its batch held {shown}{more} (all of it: 'examples' of that step in metrics.jsonl)"
    )


@dataclass
class EarlyStopping:
    """Counts consecutive evaluations without improvement.

    patience  stop after this many; 0 = never
    mode      whether the largest or the smallest value is the best
    """

    patience: int
    mode: Literal["max", "min"] = "max"
    best: float = math.nan
    waited: int = 0

    @classmethod
    def replay(cls, patience: int, mode: Literal["max", "min"], values: Iterable[float]) -> EarlyStopping:
        """The state after earlier evaluations, of a run that is resumed."""
        stopping = cls(patience, mode)
        for value in values:
            stopping.update(value)
        return stopping

    def update(self, value: float) -> bool:
        """Take note of an evaluation. Returns whether it is the best so far."""
        ahead = value > self.best if self.mode == "max" else value < self.best
        better = ahead or (math.isnan(self.best) and not math.isnan(value))
        self.best, self.waited = (value, 0) if better else (self.best, self.waited + 1)
        return better

    @property
    def should_stop(self) -> bool:
        """Whether the run is to stop."""
        return 0 < self.patience <= self.waited
