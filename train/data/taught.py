"""Training data that a student and its teacher read: the same completions, behind other prompts perhaps."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from jaxsteer.batches import stack_flat
from jaxsteer.groups import Group, stack_groups
from jaxsteer.objectives import Taught
from jaxsteer.types import Batch
from train.data.examples import TokenizedExample
from train.data.packing import RowOrder
from train.data.pairs import Layout
from train.data.store import TokenStore


class Origin(NamedTuple):
    """What a teacher is besides what it reads: a digest, and the files or models that it is made of."""

    digest: str = ""
    files: tuple[str, ...] = ()


OWN_BASE = Origin()
"""A teacher that is the untouched student."""


@dataclass(frozen=True, eq=False)
class TaughtSource:
    """Training batches of rows as the student and as the teacher read them.

    student, teacher  the examples, one by one
    layout   how rows are made
    shared   write what all of the teacher's examples begin with once in each row, see `jaxsteer.groups`
    by       what the teacher is besides what it reads
    """

    student: TokenStore
    teacher: TokenStore
    layout: Layout
    shared: bool = True
    by: Origin = OWN_BASE
    context: int = field(init=False)
    """Tokens that all of the teacher's examples begin with, if they are shared."""
    order: RowOrder = field(init=False, repr=False)
    """Which examples are in each row."""

    def __post_init__(self) -> None:
        """Check that the examples correspond, and lay out the rows.

        Raises:
            ValueError: naming the example: its completion is not the same for both, or it does not fit a row.
        """
        check_taught(self.student, self.teacher)
        context = common_beginning(self.teacher) if self.shared else 0
        lengths = np.maximum(self.student.lengths, self.teacher.lengths - context)
        longest = int(lengths.argmax())
        if lengths[longest] > self.layout.sequence_length:
            raise ValueError(
                f"{self.student.source(longest)}: {lengths[longest]} tokens, as the teacher reads it, do not fit a row "
                f"of {self.layout.sequence_length}; raise --sequence-length"
            )
        object.__setattr__(self, "context", context)
        object.__setattr__(self, "order", self.layout.order(lengths))

    @property
    def batch_size(self) -> int:
        """Rows of a step."""
        return self.layout.batch_size

    @property
    def examples(self) -> Sequence[TokenizedExample]:
        """What the student reads."""
        return self.student

    @property
    def fill(self) -> float:
        """Fraction of an epoch's tokens that are not padding, 0 to 1."""
        return self.order.fill

    def steps(self, epochs: float) -> int:
        """Number of batches in this many epochs; the last batch may extend into the next epoch."""
        return self.order.steps(epochs)

    def batch(self, step: int, rows: Iterable[int] | None = None) -> Taught:
        """The rows of a step, numpy [B, T], and the teacher's, [B, context + T]."""
        members = self.order.members(step, rows)
        flat = self.student.flat(np.concatenate([np.empty(0, np.int32), *members]))
        own = stack_flat(flat, [len(row) for row in members], self.layout.sequence_length)
        return Taught(own, self._teacher_rows(members))

    def _teacher_rows(self, members: Sequence[np.ndarray]) -> Batch:
        together = lambda row: [Group(tuple(self.teacher[i] for i in row), self.context)] if row else []
        rows = [together(row.tolist()) for row in members]
        return stack_groups(rows, self.context + self.layout.sequence_length, trunks=self.context > 0).batch

    def digest(self) -> str:
        """sha256, in hexadecimal, of all that student and teacher see, and of what the teacher is."""
        return hashlib.sha256(f"{self.student.digest()} {self.teacher.digest()} {self.by.digest}".encode()).hexdigest()

    @property
    def files(self) -> list[str]:
        """The files that the examples come from, the first few, and the teacher's."""
        return [*self.student.files, *self.by.files]

    def named(self, step: int) -> list[list[str]]:
        """The sources of the examples in each row of a step."""
        return [[self.student.source(int(i)) for i in row] for row in self.order.members(step)]


def check_taught(student: TokenStore, teacher: TokenStore) -> None:
    """Refuse examples whose completions are not the same tokens for student and teacher."""
    for i, (one, other) in enumerate(zip(student, teacher, strict=True)):
        counts, theirs = one.weights != 0, other.weights != 0
        if not np.array_equal(one.ids[counts], other.ids[theirs]):
            raise ValueError(
                f"{student.source(i)}: its completion becomes other tokens behind the teacher's prompt; let the "
                "prompts end in the same way"
            )


def common_beginning(store: TokenStore) -> int:
    """Tokens that all examples begin with, of which none is the last before a target."""
    first = store[0].ids
    agreed = len(first)
    for example in store:
        before = max(0, int(np.argmax(example.weights != 0)) - 1)
        agreed = min(agreed, before)
        same = example.ids[:agreed] == first[:agreed]
        agreed = agreed if same.all() else int(np.argmin(same))
        if not agreed:
            return 0
    return agreed
