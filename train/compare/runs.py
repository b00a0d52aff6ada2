"""The runs of a comparison: trained together, answered, kept; and the search for the learning rate."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from jaxsteer.io import LoadedModel, files, load_steering, save_steering
from jaxsteer.io.files import write_json
from jaxsteer.models.transformer import Model
from jaxsteer.orthogonality import chance_overlap
from jaxsteer.types import PyTree, Steering
from train.compare.config import CompareConfig, Entry
from train.compare.sweep import Run, Trained, train_runs
from train.config import TrainConfig
from train.evaluation.answers import Prompts, decode, make_prompts
from train.run.lofit import lofit


class Comparison:
    """A comparison under way: its folder of finished runs, and what every run needs."""

    def __init__(self, config: CompareConfig, loaded: LoadedModel, advance: Callable[[int], None]) -> None:
        self.config, self.loaded, self.advance = config, loaded, advance
        self.folder = Path(config.out) / "runs"
        self.prompts: dict[str, Prompts] = {}
        limits = {"validation": config.base.validation_examples, "test": config.base.test_examples}
        for split, limit in limits.items():
            examples = config.base.task.load(split)[:limit]  # type: ignore[arg-type]
            if not examples:
                raise ValueError(f"the task has no {split} examples; a comparison needs training, validation and test")
            self.prompts[split] = make_prompts(
                examples, loaded.require_tokenizer(), loaded.stop_tokens, config.base.task
            )

    def path(self, entry: Entry, exponent: int, seed: int) -> Path:
        """The record of one run."""
        return self.folder / entry.slug / f"rate{exponent:+d}_seed{seed}.json"

    def record(self, entry: Entry, exponent: int, seed: int) -> dict[str, Any] | None:
        """What a finished run left; None where it is not finished.

        Raises:
            ValueError: the run was made with other settings of its entry.
        """
        path = self.path(entry, exponent, seed)
        if not path.exists():
            return None
        found = files.read_json(path)
        if found["entry"] != _plain(entry):
            raise ValueError(
                f"{path}: made with other settings of {entry.name!r}; delete {path.parent}, or rename the entry"
            )
        return found

    def finish(self, entry: Entry, runs: Sequence[tuple[int, int]]) -> list[dict[str, Any]]:
        """The records of runs (exponent, seed); those that are not there yet are trained together and answered."""
        missing = [run for run in runs if self.record(entry, *run) is None]
        if missing:
            config = self.config.train_config(entry)
            settings = [Run(self.config.factor**exponent, seed) for exponent, seed in missing]
            for (exponent, seed), trained in zip(missing, self.train(entry, config, settings), strict=True):
                self.keep(entry, exponent, seed, trained)
        return [self.record(entry, *run) for run in runs]  # type: ignore[misc]

    def train(self, entry: Entry, config: TrainConfig, runs: Sequence[Run]) -> Sequence[Trained]:
        """Train runs of one entry by its recipe."""

        def fit(stage: str, config: TrainConfig, initial: Any) -> Sequence[Trained]:
            return train_runs(config, self.loaded, runs, initial=initial, advance=self.advance)

        if entry.recipe == "lofit":
            return lofit(fit, config, self.steps, heads=entry.heads)
        return fit("", config, None)

    def untouched(self) -> list[int]:
        """Which test answers of the plain model are right, 1 or 0; kept like a run."""
        path = self.folder / "untouched.json"
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            write_json(path, {"test": self.answer("test", Model(self.loaded.config), self.loaded.base, {})})
        return list(files.read_json(path)["test"])

    @property
    def steps(self) -> int:
        """Updates of every run."""
        assert self.config.base.steps is not None
        return self.config.base.steps

    def keep(self, entry: Entry, exponent: int, seed: int, trained: Trained) -> None:
        """Answer validation with a trained run and write its record."""
        path, training = self.path(entry, exponent, seed), trained.training
        path.parent.mkdir(parents=True, exist_ok=True)
        answer = lambda split: self.answer(split, training.model, trained.params.base, trained.params.steering)
        if not entry.train_base:
            save_steering(
                path.with_suffix(".safetensors"),
                trained.params.steering,
                training.model.plan,
                model_name=self.config.base.model,
                config=self.loaded.config,
            )
        write_json(
            path,
            {
                "entry": _plain(entry),
                "exponent": exponent,
                "factor": self.config.factor**exponent,
                "seed": seed,
                "trainable": training.trainable,
                "steps": self.steps,
                "losses": [float(loss) for loss in trained.losses],
                "overlap": trained.overlap.tolist(),
                "chance_overlap": chance_overlap(training.model.plan, trained.params.steering, training.orthogonality),
                "diverged": trained.diverged,
                "validation": answer("validation"),
                # A trained base is not kept for later; its test answers wait here, unread by the search.
                "test": answer("test") if entry.train_base else None,
            },
        )

    def answer(self, split: str, model: Model, base: PyTree, steering: Steering) -> list[int]:
        """Which answers to a split's prompts are right, 1 or 0."""
        batch_size = self.config.base.eval_batch_size
        answers = decode(
            model, base, steering, self.prompts[split], self.loaded.require_tokenizer(), batch_size=batch_size
        )
        return [int(answer.correct) for answer in answers]

    def tested(self, entry: Entry, exponent: int, seed: int) -> dict[str, Any]:
        """The record of a finished run with its test answers."""
        record, path = self.record(entry, exponent, seed), self.path(entry, exponent, seed)
        assert record is not None
        if record["test"] is None:
            saved = load_steering(path.with_suffix(".safetensors"))
            saved.check(self.loaded.config)
            model = Model(self.loaded.config, saved.plan)
            record["test"] = self.answer("test", model, self.loaded.base, saved.steering)
            write_json(path, record)
        return record


def _plain(entry: Entry) -> dict[str, Any]:
    """An entry as JSON gives it back."""
    data = dataclasses.asdict(entry)
    data["plan"] = list(entry.plan)
    data["orthogonality"]["sites"] = list(entry.orthogonality.sites)
    return data


def validation_rate(record: dict[str, Any]) -> float:
    """Share of right answers on validation; below any other where the run diverged."""
    return -1.0 if record["diverged"] else sum(record["validation"]) / len(record["validation"])


def search(comparison: Comparison, entry: Entry, note: Callable[[str], None]) -> tuple[int, list[dict[str, Any]]]:
    """The best learning rate on validation, as a power of the factor, and the records of all that were tried.

    Among equals the one in the middle of the grid. While the best is at the edge the grid grows by one beyond it.
    """
    config = comparison.config
    grid = config.exponents
    records = comparison.finish(entry, [(exponent, 0) for exponent in grid])
    for _ in range(config.extensions + 1):
        rates = dict(zip(grid, map(validation_rate, records), strict=True))
        middle = (grid[0] + grid[-1]) / 2
        best = max(grid, key=lambda exponent: (rates[exponent], -abs(exponent - middle)))
        percent = lambda rate: "diverged" if rate < 0 else f"{100 * rate:.1f} %"
        shown = ", ".join(f"{config.factor**e * entry.lr:.2g}: {percent(rates[e])}" for e in grid)
        note(f"{entry.name}: validation at learning rates {shown}")
        if grid[0] < best < grid[-1] or len(grid) == config.rates + config.extensions:
            break
        grid = [grid[0] - 1, *grid] if best == grid[0] else [*grid, grid[-1] + 1]
        records = comparison.finish(entry, [(exponent, 0) for exponent in grid])
    return best, records
