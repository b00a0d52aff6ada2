"""Training data with neutral text beside it, on which a model is to stay as it was."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from jaxsteer.batches import stack_rows
from jaxsteer.objectives import Kept
from train.data.examples import TokenizedExample, digest_of
from train.data.packing import DataSource


@dataclass(frozen=True, eq=False)
class KeptSource:
    """Batches of examples, each row with a neutral text beside it; the texts come in turn.

    learned  the examples
    neutral  the texts
    length   tokens of a text's row
    """

    learned: DataSource
    neutral: Sequence[TokenizedExample]
    length: int

    @property
    def examples(self) -> Sequence[TokenizedExample]:
        """The examples to learn."""
        return self.learned.examples

    @property
    def batch_size(self) -> int:
        """Rows of a step."""
        return self.learned.batch_size

    @property
    def fill(self) -> float:
        """Fraction of an epoch's tokens that are not padding, 0 to 1; neutral text is not in it."""
        return self.learned.fill

    def steps(self, epochs: float) -> int:
        """Number of steps in this many passes over the examples."""
        return self.learned.steps(epochs)

    def ordered_by(self, seed: int) -> KeptSource:
        """The same in another order."""
        return replace(self, learned=self.learned.ordered_by(seed))

    def batch(self, step: int, rows: Iterable[int] | None = None) -> Kept:
        """The rows of a step, numpy [B, T], and the texts beside them, [B, length]."""
        rows = list(range(self.batch_size) if rows is None else rows)
        order = np.random.default_rng(self.learned.seed).permutation(len(self.neutral))
        chosen = [order[(step * self.batch_size + row) % len(order)] for row in rows]
        return Kept(self.learned.batch(step, rows), stack_rows([[self.neutral[i]] for i in chosen], self.length))

    def digest(self) -> str:
        """sha256, in hexadecimal, of all that training sees."""
        return hashlib.sha256(f"{self.learned.digest()} {digest_of(self.neutral)}".encode()).hexdigest()

    @property
    def files(self) -> list[str]:
        """The files that the examples come from; the first few."""
        return self.learned.files

    def named(self, step: int) -> list[list[str]]:
        """The sources of the examples in each row of a step."""
        return self.learned.named(step)
