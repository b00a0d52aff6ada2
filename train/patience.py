"""When a run has stopped getting better."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


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
