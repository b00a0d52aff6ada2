"""The runs of a comparison: training them together, answering, recording; and the search for the learning rate."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

from jaxsteer.io import LoadedModel, load_steering, save_steering
from jaxsteer.io.files import write_json
from jaxsteer.models.transformer import Model
from jaxsteer.orthogonality import chance_overlap
from jaxsteer.params import Params
from jaxsteer.types import Plan, Steering
from train.compare.check import evaluator_of
from train.compare.config import CompareConfig, Entry
from train.compare.records import NOT_MEASURED, Measured, RunRecord, Untouched, read_record
from train.compare.sweep import Run, Trained, train_runs
from train.config import TrainConfig
from train.config.run import KeepConfig
from train.evaluation.divergence import divergences
from train.evaluation.neutral import read_neutral
from train.run.lofit import lofit
from train.run.memory import enough_memory
from train.run.result import notes_of
from train.run.training import RunData, read_data
from train.tasks import Split


class Comparison:
    """A comparison in progress: its folder of finished runs, and what every run needs.

    Args:
        config: with the number of steps filled in.
        loaded: the base model.
        advance: called with the number of training steps done since the last call, over all runs.
    """

    def __init__(self, config: CompareConfig, loaded: LoadedModel, advance: Callable[[int], None]) -> None:
        self.config, self.loaded, self.advance = config, loaded, advance
        self.folder = Path(config.out) / "runs"
        self.evaluator = evaluator_of(config, loaded)
        self.texts = None if config.neutral is None else read_neutral(config.neutral)
        self._data: dict[tuple[int, KeepConfig], RunData] = {}

    def path(self, entry: Entry, exponent: int, seed: int) -> Path:
        """The record of one run."""
        return self.folder / entry.slug / f"rate{exponent:+d}_seed{seed}.json"

    def record(self, entry: Entry, exponent: int, seed: int) -> RunRecord | None:
        """The record of a finished run; None if it has not finished.

        Raises:
            ValueError: the run was made with other settings of its entry.
        """
        path = self.path(entry, exponent, seed)
        if not path.exists():
            return None
        record = read_record(path, RunRecord)
        if record["entry"] != _as_json(entry):
            raise ValueError(
                f"{path}: made with other settings of {entry.name!r}; delete {path.parent}, or rename the entry"
            )
        return record

    def finish(self, entry: Entry, runs: Sequence[tuple[int, int]]) -> list[RunRecord]:
        """The records of runs (exponent, seed), after training and answering those that have not finished."""
        missing = [run for run in runs if self.record(entry, *run) is None]
        config, size = self.config.train_config(entry), self.config.merged(entry, len(runs))
        for start in range(0, len(missing), size):
            group = missing[start : start + size]
            settings = [Run(self.config.factor**exponent, seed) for exponent, seed in group]
            with enough_memory(config, "step", runs=len(group)):
                done = self.train(entry, config, settings)
            for (exponent, seed), trained in zip(group, done, strict=True):
                self.keep(entry, exponent, seed, trained)
        return [self.record(entry, *run) for run in runs]  # type: ignore[misc]

    def train(self, entry: Entry, config: TrainConfig, runs: Sequence[Run]) -> Sequence[Trained]:
        """Train runs of one entry together, in one stage or in LoFiT's two."""

        def fit(stage: str, config: TrainConfig, initial: Sequence[Steering] | None) -> Sequence[Trained]:
            return train_runs(config, self.loaded, runs, data=self.data(entry), initial=initial, advance=self.advance)

        if entry.lofit is not None:
            return lofit(fit, config, self.config.steps, heads=entry.lofit.heads)
        return fit("", config, None)

    def data(self, entry: Entry) -> RunData:
        """The training examples of a method, read once for all runs that have the same."""
        key = entry.method.train_examples, entry.method.keep
        if key not in self._data:
            self._data[key] = read_data(self.config.train_config(entry), self.loaded)
        return self._data[key]

    def untouched(self) -> list[int]:
        """Which test answers of the base model are right, 1 or 0; recorded like a run."""
        path = self.folder / "untouched.json"
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            write_json(path, {"test": self.answer("test", (), Params(None, {}))})
        return read_record(path, Untouched)["test"]

    def keep(self, entry: Entry, exponent: int, seed: int, trained: Trained) -> None:
        """Answer the validation examples with a trained run, and write its steering file and record."""
        path, training, params = self.path(entry, exponent, seed), trained.training, trained.params
        path.parent.mkdir(parents=True, exist_ok=True)
        program, trains_base = training.program, entry.method.train_base
        plan, answering = program.model.plan, params if trains_base else Params(None, params.steering)
        if not trains_base:
            save_steering(
                path.with_suffix(".safetensors"),
                params.steering,
                plan,
                model_name=self.config.base.model,
                config=self.loaded.config,
                notes=notes_of(training.config) | {"learning_rate_factor": self.config.factor**exponent},
                sample=self.loaded.sample,
            )
        record: RunRecord = {
            "entry": _as_json(entry),
            "exponent": exponent,
            "factor": self.config.factor**exponent,
            "seed": seed,
            "trainable": training.trainable,
            "examples": len(training.data.examples),
            "steps": self.config.steps,
            "losses": [float(loss) for loss in trained.losses],
            "overlap": trained.overlap.tolist(),
            "chance_overlap": chance_overlap(plan, params.steering, program.orthogonality),
            "diverged": trained.diverged,
            "validation": self.answer("validation", plan, answering),
            # A trained base is not saved, so its test answers are made now; the search does not read them.
            **(self.measured(plan, answering, seed) if trains_base else NOT_MEASURED),
        }
        write_json(path, record)

    def answer(self, split: Split, plan: Plan, params: Params) -> list[int]:
        """Which answers to a split's questions are correct, 1 or 0."""
        evaluator = self.evaluator.steered_by(Model(self.loaded.config, plan))
        if self.config.scoring == "predictions":
            return list(map(int, evaluator.predicted(split, params)))
        return [int(answer.correct) for answer in evaluator.answer(split, params)]

    def moved(self, plan: Plan, params: Params) -> list[float] | None:
        """KL(base ‖ trained) of each neutral text, nats per token; None if the comparison has none."""
        if self.texts is None:
            return None
        return divergences(self.evaluator.steered_by(Model(self.loaded.config, plan)), params, self.texts)

    def measured(self, plan: Plan, params: Params, seed: int) -> Measured:
        """What is measured of a run that counts."""
        return {
            "test": self.answer("test", plan, params),
            "kl": self.moved(plan, params),
            "decoded": self.decoded(plan, params) if seed == 0 else None,
        }

    def decoded(self, plan: Plan, params: Params) -> list[int] | None:
        """Which decoded answers to the first test questions are right, 1 or 0; None if none are to be decoded."""
        if not self.config.decoded:
            return None
        evaluator = self.evaluator.steered_by(Model(self.loaded.config, plan))
        questions = evaluator.examples("test")[: self.config.decoded]
        return [int(answer.correct) for answer in evaluator.answer(questions, params)]

    def runs_of(self, entry: Entry, note: Callable[[str], None]) -> tuple[int, list[RunRecord], list[RunRecord]]:
        """Make all runs of a method that have not finished.

        Args:
            entry: the method.
            note: called with a line of text on each grid of learning rates.

        Returns:
            The best learning rate as a power of the grid's factor, a record for each rate tried, and one for each seed.
        """
        best, tried = search(self, entry, note)
        self.finish(entry, [(best, seed) for seed in range(self.config.seeds)])
        seeds = [self.tested(entry, best, seed) for seed in range(self.config.seeds)]
        if self.texts is not None and any(record["kl"] is None for record in seeds):
            note(
                f"{entry.name}: no KL on neutral text: its runs were made without --neutral, and full fine-tuning "
                f"keeps no weights to measure it afterwards. To train them again, delete {self.folder / entry.slug}"
            )
        return best, tried, seeds

    def tested(self, entry: Entry, exponent: int, seed: int) -> RunRecord:
        """The record of a finished run, with what is measured of those that count.

        Neutral texts may have been added since; what the base's training moved there cannot be measured afterwards.
        """
        record, path = self.record(entry, exponent, seed), self.path(entry, exponent, seed)
        assert record is not None
        lacks_kl = record["kl"] is None and self.texts is not None and not entry.method.train_base
        if record["test"] is not None and not lacks_kl:
            return record
        saved = load_steering(path.with_suffix(".safetensors"))
        saved.check(self.loaded.config)
        saved.check_weights(self.loaded.sample)
        plan, params = saved.plan, Params(None, saved.steering)
        if record["test"] is None:
            record |= self.measured(plan, params, seed)
        else:
            record["kl"] = self.moved(plan, params)
        write_json(path, record)
        return record


def _as_json(entry: Entry) -> dict[str, object]:
    """What an entry's runs depend on, as it is read back from a JSON file."""
    return json.loads(json.dumps(dataclasses.asdict(dataclasses.replace(entry, series=None))))


def validation_rate(record: RunRecord) -> float:
    """Share of right validation answers; -1, below any other, if the run diverged."""
    return -1.0 if record["diverged"] else sum(record["validation"]) / len(record["validation"])


class Runs(Protocol):
    """What a search needs of a comparison."""

    config: CompareConfig

    def finish(self, entry: Entry, runs: Sequence[tuple[int, int]]) -> list[RunRecord]:
        """The records of runs (exponent, seed)."""
        ...


def search(comparison: Runs, entry: Entry, note: Callable[[str], None]) -> tuple[int, list[RunRecord]]:
    """Find the learning rate with the best validation accuracy.

    Ties go to the rate nearest to the middle of the grid. While the best rate is at an edge, the grid grows by one rate
    beyond it.

    Args:
        comparison: trains and answers the runs.
        entry: the method.
        note: called with a line of text on each grid.

    Returns:
        The best rate as a power of the grid's factor, and a record for every rate tried, in order.
    """
    config = comparison.config
    grid = config.exponents
    records = comparison.finish(entry, [(exponent, 0) for exponent in grid])
    for _ in range(config.extensions + 1):
        accuracy = dict(zip(grid, map(validation_rate, records), strict=True))
        middle = (grid[0] + grid[-1]) / 2
        best = max(grid, key=lambda exponent: (accuracy[exponent], -abs(exponent - middle)))
        percent = lambda share: "diverged" if share < 0 else f"{100 * share:.1f} %"
        by_rate = ", ".join(f"{config.factor**e * entry.lr:.2g}: {percent(accuracy[e])}" for e in grid)
        note(f"{entry.name}: validation accuracy by learning rate: {by_rate}")
        if grid[0] < best < grid[-1] or len(grid) == config.most_rates:
            break
        grid = [grid[0] - 1, *grid] if best == grid[0] else [*grid, grid[-1] + 1]
        records = comparison.finish(entry, [(exponent, 0) for exponent in grid])
    return best, records
