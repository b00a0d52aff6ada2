"""What a run asks of its training data, whatever it learns from."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Protocol

from train.data.examples import TokenizedExample


class StepSource(Protocol):
    """The inputs of each step, as a pure function of the data, the settings and the step."""

    @property
    def examples(self) -> Sequence[TokenizedExample]:
        """What a person is shown of the data."""
        ...

    @property
    def batch_size(self) -> int:
        """Rows of a step."""
        ...

    @property
    def fill(self) -> float:
        """Fraction of an epoch's tokens that are not padding, 0 to 1; NaN if it is not known before training."""
        ...

    def steps(self, epochs: float) -> int:
        """Number of steps in this many passes over the data."""
        ...

    def batch(self, step: int, rows: Iterable[int] | None = None) -> Any:
        """The inputs of a step (from 0): a `Batch`, or what its objective takes; numpy, the rows first in every leaf.

        Args:
            step: from 0.
            rows: only these rows, numbered within the step; None for all.
        """
        ...

    def digest(self) -> str:
        """sha256, in hexadecimal, of all that training sees of the data."""
        ...

    @property
    def files(self) -> list[str]:
        """The files (or data sets) that the data come from; the first few."""
        ...

    def named(self, step: int) -> list[list[str]]:
        """The sources of the examples in each row of a step."""
        ...
