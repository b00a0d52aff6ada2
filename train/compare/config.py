"""Settings of a comparison."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, Literal

import tyro

from jaxsteer.orthogonality import Orthogonality
from jaxsteer.ranges import Count, Inside, Natural, Positive, Range, check_ranges
from train.config import TrainConfig
from train.config.run import KeepConfig


@dataclass(frozen=True)
class Method:
    """The settings of a training run that differ between methods; its fields are fields of TrainConfig."""

    plan: tuple[str, ...]
    """The steering plan, as in a training run; for LoFiT, the plan of its second stage."""
    train_base: bool = False
    """Train the base model's weights too."""
    orthogonality: Orthogonality = field(default_factory=Orthogonality)
    """How LoRA and steering are kept orthogonal, in a plan that has both."""
    keep: KeepConfig = field(default_factory=KeepConfig)
    """Hold predictions on neutral text where they were."""
    train_examples: Natural = 0
    """Number of training examples to use; 0: all."""

    def __post_init__(self) -> None:
        """Reject a negative number of examples."""
        check_ranges(self, "method: ")


@dataclass(frozen=True)
class LoFiT:
    """Train in LoFiT's two stages, which share the steps of one run."""

    heads: Count = 32
    """Number of attention heads that the second stage shifts."""

    def __post_init__(self) -> None:
        """Reject a number of heads below 1."""
        check_ranges(self, "lofit: ")


@dataclass(frozen=True)
class Entry:
    """One method of a comparison: a row of its table."""

    name: str
    """Name in the table."""
    method: Method
    """How to train."""
    lr: Positive
    """Learning rate in the middle of the grid, of steering (and of all that trains, unless weights_lr is given)."""
    weights_lr: Positive | None = None
    """The same for LoRA or the base model. The grid multiplies both."""
    lofit: LoFiT | None = None
    """Train in LoFiT's two stages; None = in one."""
    series: str | None = None
    """Entries with the same series are points of one line in the plots."""

    def __post_init__(self) -> None:
        """Reject rates that nothing learns with."""
        check_ranges(self, f"entry {self.name!r}: ")

    @property
    def slug(self) -> str:
        """The name as a file name."""
        return "".join(c if c.isalnum() else "_" for c in self.name.lower()).strip("_")


@dataclass(frozen=True)
class Contrast:
    """The accuracy of a method minus that of another, named before any is measured."""

    name: str
    """What it asks."""
    first: str
    """Name of an entry."""
    second: tuple[str, ...]
    """Names of entries; of several, the one with the best validation accuracy."""


Axis = Literal["parameters", "examples"]

IGNORED = (
    "mesh",
    "distributed",
    "evaluate_every",
    "select_by",
    "show_answers",
    "patience",
    "nonfinite",
    "track",
    "profile",
    "checkpoints",
    "start_from",
    "extend",
    "new_data",
)
"""Settings of a run that a comparison has no use for: its runs train together on one device, without checkpoints."""


@dataclass(frozen=True)
class CompareConfig:
    """A comparison of methods."""

    base: TrainConfig = field(default_factory=TrainConfig)
    """What all methods share: model, task, budget, optimizer."""
    entries: tyro.conf.Suppress[tuple[Entry, ...]] = ()
    """The methods to compare, given in the config file."""
    contrasts: tyro.conf.Suppress[tuple[Contrast, ...]] = ()
    """The planned contrasts between them, for whose number p-values are corrected; given in the config file."""
    methods: tuple[str, ...] = ()
    """Names of the methods to run and report, in the order of the config file. Contrasts with the others count in the
    correction all the same. None given: all methods."""
    axis: Axis = "parameters"
    """What the plot has accuracy against: the number of trainable parameters, or of training examples."""
    neutral: str | None = None
    """Text file with one neutral text per line: how far each method moves the predictions there is measured and plotted
    too. It can be added to a comparison that has been made, except for full fine-tuning. None: it is not measured."""
    margin: Inside = 0.01
    """Largest difference in accuracy that counts as none, in the test that two methods are equal."""
    factor: Annotated[float, Range(1, open_low=True)] = 3.0
    """Ratio of neighbouring learning rates in the grid."""
    scoring: Literal["answers", "predictions"] = "answers"
    """How accuracy is measured. answers: generated, and read by the task's rule. predictions: whether each token of the
    right answer, its end included, is the likeliest given those before, in one pass over packed rows; the same as
    generated answers that must be exactly right."""
    decoded: Natural = 0
    """With scoring predictions: number of test examples that the first seed of each method answers by decoding too, to
    show how the two agree."""
    rates: Count = 3
    """Number of learning rates in the first grid: odd, with the method's own in the middle. 1: each method's own rate,
    without a search."""
    extensions: Natural = 3
    """Maximum number of learning rates to add, one at a time, while the best is at the grid's edge. A single rate has
    no edge."""
    seeds: Count = 3
    """Number of runs, with different seeds, at the best learning rate."""
    together: Count | None = None
    """Maximum number of runs of one method that train together, as one program. Fewer need less memory, and a
    comparison that is stopped loses less. None: all of a method's learning rates, then all of its seeds. In full
    fine-tuning, where they have no weights in common, always one."""
    timings: bool = True
    """After all runs, measure the time and memory of a step of each method."""
    workers: Count = 1
    """Number of processes that make the runs, each of one method at a time, with an equal share of the CPU's cores. For
    a small model several are faster than one. Results may differ in the last digits."""
    out: str = "runs/compare"
    """Output folder."""

    def __post_init__(self) -> None:
        """Reject settings that no comparison could have."""
        check_ranges(self)
        if self.rates % 2 == 0:
            raise ValueError(f"--rates must be odd, with each method's own rate in the middle; got {self.rates}")
        if ignored := [name for name in IGNORED if getattr(self.base, name) != getattr(TrainConfig(), name)]:
            raise ValueError(
                f"comparison: base.{ignored[0]} has no effect here; leave it and {', '.join(IGNORED)} at their defaults"
            )
        own = {name: getattr(self.base, name) for name in _method_fields(Method(()))}
        if given := [name for name, value in own.items() if value != getattr(TrainConfig(), name)]:
            raise ValueError(f"comparison: base.{given[0]} has no effect here; each method has its own {given[0]}")
        slugs = [entry.slug for entry in self.entries]
        if repeated := sorted({slug for slug in slugs if slugs.count(slug) > 1}):
            raise ValueError(f"comparison: two entries have the name {repeated[0]!r}; rename one")
        if self.decoded and self.scoring != "predictions":
            raise ValueError(f"--decoded {self.decoded}: needs --scoring predictions")
        self._check_names([entry.name for entry in self.entries])

    def _check_names(self, names: Sequence[str]) -> None:
        if self.entries and (unknown := [name for name in self.methods if name not in names]):
            raise ValueError(f"--methods: there is no method {unknown[0]!r}; known are {'; '.join(names)}")
        for contrast in self.contrasts:
            if not contrast.second:
                raise ValueError(f"contrast {contrast.name!r}: nothing to compare {contrast.first!r} with")
            if unknown := [name for name in (contrast.first, *contrast.second) if name not in names]:
                raise ValueError(f"contrast {contrast.name!r}: no entry {unknown[0]!r}; there are {'; '.join(names)}")

    @property
    def chosen(self) -> tuple[Entry, ...]:
        """The methods to run."""
        return tuple(entry for entry in self.entries if not self.methods or entry.name in self.methods)

    @property
    def exponents(self) -> list[int]:
        """The first grid: powers of `factor` that multiply an entry's learning rates."""
        half = self.rates // 2
        return list(range(-half, half + 1))

    @property
    def most_rates(self) -> int:
        """Number of learning rates at which a grid stops growing."""
        return self.rates + self.extensions if self.rates > 1 else 1

    @property
    def timed_runs(self) -> int:
        """Number of runs in the program whose cost is timed: those of the first grid, or all seeds without a search."""
        return self.rates if self.rates > 1 else self.seeds

    @property
    def steps(self) -> int:
        """Updates per run; known once the data has been counted."""
        assert self.base.steps is not None
        return self.base.steps

    @property
    def planned_steps(self) -> int:
        """Updates of all runs of a method whose grid does not grow."""
        return self.steps * (self.rates + self.seeds - 1)

    def merged(self, entry: Entry, runs: int) -> int:
        """How many of a method's runs train as one program: one in full fine-tuning, whose weights none share."""
        return 1 if entry.method.train_base else min(runs, self.together or runs)

    def train_config(self, entry: Entry) -> TrainConfig:
        """The settings of one method's runs, at the middle of the grid."""
        optim = replace(self.base.optim, lr=entry.lr, weights_lr=entry.weights_lr)
        return replace(self.base, optim=optim, **_method_fields(entry.method))

    def to_json(self) -> dict[str, Any]:
        """What finished runs depend on, for config.json. Not entries or neutral texts, which may be added later."""
        base = self.base.to_json()
        for name in _method_fields(Method(())):
            del base[name]
        measured = {name: getattr(self, name) for name in ("scoring", "decoded")}
        chosen = {name: value for name, value in measured.items() if value != getattr(CompareConfig, name)}
        return {"base": base, "factor": self.factor} | chosen


def _method_fields(method: Method) -> dict[str, Any]:
    return {setting.name: getattr(method, setting.name) for setting in dataclasses.fields(Method)}
