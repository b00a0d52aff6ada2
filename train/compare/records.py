"""The JSON files of a comparison: records of runs, timings, and results.json."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NotRequired, TypedDict, TypeVar, cast

import numpy as np

from jaxsteer.io.files import read_json
from train.compare.config import Entry
from train.evaluation.statistics import Estimate


class Measured(TypedDict):
    """What is measured of the runs that count, and None of those that only chose the learning rate.

    test     which test answers are right, 1 or 0
    kl       KL(base ‖ trained) of each neutral text, nats per token; None too if there are no such texts
    decoded  which decoded answers to the first test questions are right by the task's rule, 1 or 0; of the first seed
    """

    test: list[int] | None
    kl: list[float] | None
    decoded: list[int] | None


NOT_MEASURED: Measured = {"test": None, "kl": None, "decoded": None}


class RunRecord(Measured):
    """One finished run: runs/SLUG/rate±N_seedN.json."""

    entry: dict[str, object]
    exponent: int
    factor: float
    seed: int
    trainable: int
    examples: int
    steps: int
    losses: list[float]
    overlap: list[list[float]]
    chance_overlap: float
    diverged: bool
    validation: list[int]


class Untouched(TypedDict):
    """Which test answers of the base model are right, 1 or 0: runs/untouched.json."""

    test: list[int]


class Timing(TypedDict):
    """What a training step costs: runs/SLUG/timing.json.

    tokens_per_second  of a single run; padding is not counted
    step_bytes         memory that the compiled step of a single run needs: weights, state and temporaries
    sweep_cost         seconds per step of a sweep over those of a single run (K runs one after another cost K); None
                       if K is 1, as in full fine-tuning, whose runs are not merged
    sweep_bytes        as step_bytes, of the sweep's step; None likewise
    sweep_runs         K, the runs of that sweep
    compile_seconds    for the step of a single run, then of the sweep
    """

    tokens_per_second: float
    step_bytes: int
    sweep_cost: float | None
    sweep_bytes: int | None
    sweep_runs: int
    compile_seconds: list[float]


K = TypeVar("K")


def read_record(path: Path, kind: type[K]) -> K:
    """Read a JSON file of a comparison.

    Args:
        path: the file.
        kind: RunRecord, Timing or Untouched.

    Raises:
        ValueError: it is not JSON, or lacks something that a file of this kind has.
    """
    data = read_json(path)
    wanted = kind.__annotations__  # every key of the three is required
    if missing := [name for name in wanted if name not in data]:
        raise ValueError(f"{path}: incomplete: has no {', '.join(missing)}; delete it, and it is made again")
    return cast(K, data)


class Interval(TypedDict):
    """An estimate with its 95 % interval."""

    mean: float
    low: float
    high: float


def interval_of(estimate: Estimate) -> Interval:
    """An estimate as JSON has it."""
    return {"mean": estimate.mean, "low": estimate.low, "high": estimate.high}


class Agreement(TypedDict):
    """How predictions of the right answers relate to decoded answers, on the first test examples with the first seed.

    predicted, decoded  shares that are right
    agree               share on which both are right or both wrong
    """

    examples: int
    predicted: float
    decoded: float
    agree: float


class MethodRow(TypedDict):
    """A row of the table of results. `timing` is None before it is measured."""

    method: str
    plan: list[str]
    trainable: int
    steps: int
    lr: float
    weights_lr: float | None
    validation: dict[str, float | None]
    at_edge: bool
    test: Interval
    test_by_seed: list[float]
    minus_first: Interval | None
    final_loss: list[float]
    examples: int
    kl: Interval | None
    decoded: Agreement | None
    overlap: float | None
    largest_overlap: float | None
    chance_overlap: float | None
    timing: Timing | None


Verdict = Literal["higher", "lower", "equal", "open"]
"""What a contrast shows.

higher, lower  a difference: its p-value, corrected for the number of contrasts, is below 5 %
equal          no difference is shown, and one as large as the margin is excluded, with a corrected p-value too
open           neither
"""


class ContrastRow(TypedDict):
    """A planned contrast.

    p, p_equal  of the tests that the methods differ, and that they differ by less than the margin; both corrected for
                the number of contrasts (Holm)
    detectable  the smallest true difference that 80 % of such comparisons would find, before correction
    """

    contrast: str
    first: str
    second: str
    difference: Interval
    p: float
    p_equal: float
    detectable: float
    verdict: Verdict


class Results(TypedDict):
    """results.json.

    methods     those that have finished
    unfinished  names of the others
    files       what the report wrote; not in the file
    """

    model: str
    parameters: int
    device: str
    jax: str
    examples: dict[str, int]
    seeds: int
    settings: dict[str, object]
    untouched: Interval
    methods: list[MethodRow]
    unfinished: list[str]
    differences: dict[str, dict[str, Interval]]
    contrasts: list[ContrastRow]
    margin: float
    files: NotRequired[list[str]]


@dataclass(frozen=True)
class MethodResult:
    """All runs of one method.

    best    the best learning rate, as a power of the grid's factor
    tried   a record for each learning rate, with one seed
    seeds   a record for each seed at the best learning rate, with test answers
    timing  what a step costs; None before it is measured
    """

    entry: Entry
    best: int
    tried: list[RunRecord]
    seeds: list[RunRecord]
    timing: Timing | None

    @property
    def runs(self) -> int:
        """How many runs there are; that of the best rate with the first seed is in both lists."""
        return len(self.tried) + len(self.seeds) - 1

    @property
    def test(self) -> np.ndarray:
        """Which test answers are right, 1 or 0: [seeds, examples]."""
        answers = [record["test"] for record in self.seeds]
        assert None not in answers
        return np.array(answers)

    @property
    def validation(self) -> np.ndarray:
        """Which validation answers are right, 1 or 0: [seeds, examples]."""
        return np.array([record["validation"] for record in self.seeds])

    @property
    def kl(self) -> np.ndarray | None:
        """How far each neutral text's predictions moved, nats per token: [seeds, texts]; None if not measured."""
        kl = [record["kl"] for record in self.seeds]
        return None if None in kl else np.array(kl)

    @property
    def decoded(self) -> Agreement | None:
        """Predictions beside decoded answers; None if nothing was decoded."""
        first = self.seeds[0]
        if first["decoded"] is None:
            return None
        decoded = np.array(first["decoded"])
        predicted = self.test[0][: len(decoded)]
        return {
            "examples": len(decoded),
            "predicted": float(predicted.mean()),
            "decoded": float(decoded.mean()),
            "agree": float((predicted == decoded).mean()),
        }

    @property
    def at_edge(self) -> bool:
        """Whether the best learning rate is at an edge of the grid; a single one was not searched for."""
        exponents = [record["exponent"] for record in self.tried]
        return len(exponents) > 1 and self.best in (min(exponents), max(exponents))

    @property
    def final_overlap(self) -> np.ndarray | None:
        """The overlap of LoRA and steering after the last step, [seeds, joint layers]; None without joint layers."""
        overlap = [record["overlap"][-1] for record in self.seeds if np.size(record["overlap"])]
        return np.array(overlap) if overlap else None
