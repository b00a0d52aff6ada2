"""The settings of a comparison."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, Literal

import tyro

from jaxsteer.orthogonality import Orthogonality
from train.config import TrainConfig


@dataclass(frozen=True)
class Entry:
    """One method of a comparison: a row of its table."""

    name: str
    """In the table."""
    plan: tuple[str, ...]
    """As in a training run; of a recipe, the plan that it ends with."""
    lr: float
    """The middle of the grid of learning rates, of the steering (of all that trains, unless weights_lr is given)."""
    weights_lr: float | None = None
    """The same of LoRA or the base. The grid multiplies both."""
    train_base: bool = False
    """Train the base too."""
    orthogonality: Orthogonality = field(default_factory=Orthogonality)
    """For a plan of LoRA and steering."""
    recipe: Literal["plain", "lofit"] = "plain"
    """One training, or LoFiT's two, which share the steps."""
    heads: int = 32
    """Heads that LoFiT shifts."""

    @property
    def slug(self) -> str:
        """A file name."""
        return "".join(c if c.isalnum() else "_" for c in self.name.lower()).strip("_")


@dataclass(frozen=True)
class CompareConfig:
    """A comparison of methods."""

    base: TrainConfig = field(default_factory=TrainConfig)
    """Model, task, budget, optimizer: what all methods share."""
    entries: tyro.conf.Suppress[tuple[Entry, ...]] = ()
    """The methods; they stand in the config file."""
    factor: float = 3.0
    """Between neighbouring learning rates."""
    rates: int = 3
    """Learning rates to begin with, an odd number around the entry's own."""
    extensions: int = 3
    """The most further learning rates, each one beyond the edge that is best."""
    seeds: int = 3
    """Runs at the best learning rate."""
    out: str = "runs/compare"
    """Folder of the comparison."""

    def __post_init__(self) -> None:
        """Reject settings that no comparison could have."""
        if self.rates < 3 or self.rates % 2 == 0 or self.seeds < 1 or not self.factor > 1:
            raise ValueError(
                f"comparison: rates must be odd and at least 3, seeds at least 1, factor above 1; got {self.rates}, "
                f"{self.seeds}, {self.factor}"
            )
        names = [entry.slug for entry in self.entries]
        if repeated := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"comparison: two entries have the name {repeated[0]!r}")

    @property
    def exponents(self) -> list[int]:
        """The first grid: powers of `factor` on an entry's learning rates."""
        half = self.rates // 2
        return list(range(-half, half + 1))

    def train_config(self, entry: Entry) -> TrainConfig:
        """The settings of one method's runs."""
        optim = replace(self.base.optim, lr=entry.lr, weights_lr=entry.weights_lr)
        return replace(
            self.base,
            plan=entry.plan,
            train_base=entry.train_base,
            optim=optim,
            orthogonality=entry.orthogonality,
        )

    def to_json(self) -> dict[str, Any]:
        """For config.json: what makes the finished runs what they are. Entries may be added later."""
        shared = {k: v for k, v in self.base.to_json().items() if k not in ("plan", "train_base", "orthogonality")}
        return {"base": shared, "factor": self.factor}
