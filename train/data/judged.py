"""Training data that are answers judged one by one, desirable or not, as KTO learns from them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from jaxsteer.batches import stack_rows
from jaxsteer.objectives import Judged
from train.data.examples import TokenizedExample
from train.data.packing import RowOrder
from train.data.pairs import Layout, Located, counted, places_of
from train.data.store import TokenStore


@dataclass(frozen=True, eq=False)
class JudgedSource:
    """Training batches of judged answers, with the mismatched ones that the reference point is estimated from.

    The answer that is mismatched to prompt i is that of example i + 1, where the desirable ones come first and the last
    is followed by the first. Each row has room for its answers and for its mismatched ones, so that every epoch has the
    same of them; those longer than a row are left out.

    desirable, undesirable  the answers, each of at most `layout.sequence_length` tokens
    layout  how rows are made of answers
    table   log-probabilities by the reference, fp32 [counted]; None for zeros
    """

    desirable: TokenStore
    undesirable: TokenStore
    layout: Layout
    table: np.ndarray | None = None
    order: RowOrder = field(init=False, repr=False)
    """Which answers are in each row, the desirable ones first."""
    _starts: np.ndarray = field(init=False, repr=False)  # where each answer begins in the table
    _mismatched: np.ndarray = field(init=False, repr=False)  # and each mismatched one
    _fits: np.ndarray = field(init=False, repr=False)  # whether a mismatched one is no longer than a row

    def __post_init__(self) -> None:
        """Lay out the rows.

        Raises:
            ValueError: answers of one kind only.
        """
        if not (len(self.desirable) and len(self.undesirable)):
            kind = "desirable" if len(self.desirable) else "undesirable"
            files = ", ".join(self.desirable.files or self.undesirable.files)
            raise ValueError(f"{files}: all answers are {kind}; there is nothing to tell them from")
        counts = np.concatenate([counted(self.desirable), counted(self.undesirable)])
        ends = np.append(0, np.cumsum(np.concatenate([counts, np.roll(counts, -1)])))
        lengths = np.concatenate([side.lengths for side in self._sides])
        begins = np.concatenate([_begins(side) for side in self._sides])
        other = begins + np.roll(lengths - begins, -1)
        fits = other <= self.layout.sequence_length
        object.__setattr__(self, "order", self.layout.order(np.where(fits, np.maximum(lengths, other), lengths)))
        object.__setattr__(self, "_fits", fits)
        object.__setattr__(self, "_starts", ends[: len(counts) + 1])
        object.__setattr__(self, "_mismatched", ends[len(counts) :])

    @property
    def _sides(self) -> tuple[TokenStore, TokenStore]:
        return self.desirable, self.undesirable

    @property
    def batch_size(self) -> int:
        """Rows of a step."""
        return self.layout.batch_size

    @property
    def examples(self) -> Sequence[TokenizedExample]:
        """The desirable answers."""
        return self.desirable

    @property
    def fill(self) -> float:
        """Fraction of an epoch's tokens that are not padding, 0 to 1."""
        tokens = sum(int(side.lengths.sum(dtype=np.int64)) for side in self._sides)
        return tokens / (self.order.rows_per_epoch * self.layout.sequence_length)

    @property
    def counted(self) -> int:
        """Number of tokens that count, in all answers and all mismatched ones."""
        return int(self._mismatched[-1])

    def sums(self, table: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The sum over the tokens of each desirable, and of each undesirable answer, of a table [counted]."""
        own = np.add.reduceat(table[: self._starts[-1]].astype(np.float64), self._starts[:-1])
        return own[: len(self.desirable)], own[len(self.desirable) :]

    def steps(self, epochs: float) -> int:
        """Number of batches in this many epochs; the last batch may extend into the next epoch."""
        return self.order.steps(epochs)

    def referenced(self, table: np.ndarray) -> JudgedSource:
        """The source with the log-probabilities by the reference in its batches."""
        return replace(self, table=table)

    def batch(self, step: int, rows: Iterable[int] | None = None) -> Judged:
        """The answers of a step, numpy [B, T]."""
        members = self.order.members(step, rows)
        own, other = self._located(members)
        side = np.zeros(own.places.shape, np.float32)
        for r, row in enumerate(members):
            signs = np.append(0, np.where(row < len(self.desirable), 1, -1)).astype(np.float32)
            side[r] = signs[own.batch.segments[r]]
        fields: Any = (side, self._reference(own), other.batch, self._reference(other), np.zeros_like(side))
        return Judged(own.batch, *fields)

    def located(self, step: int, rows: Iterable[int] | None = None) -> list[Located]:
        """What the reference sees of a step."""
        return self._located(self.order.members(step, rows))

    def digest(self) -> str:
        """sha256, in hexadecimal, of all that training sees of the answers."""
        return hashlib.sha256(" ".join(side.digest() for side in self._sides).encode()).hexdigest()

    @property
    def files(self) -> list[str]:
        """The files that the answers come from; the first few."""
        return list(dict.fromkeys([*self.desirable.files, *self.undesirable.files]))

    def named(self, step: int) -> list[list[str]]:
        """The sources of the answers in each row of a step."""
        return [[self._example(int(i)).source for i in row] for row in self.order.members(step)]

    def _example(self, number: int) -> TokenizedExample:
        first = len(self.desirable)
        return self.desirable[number] if number < first else self.undesirable[number - first]

    def _located(self, members: Sequence[np.ndarray]) -> list[Located]:
        """The batch of the answers, and that of the mismatched ones."""
        length = self.layout.sequence_length
        own = stack_rows([[self._example(i) for i in row.tolist()] for row in members], length)
        numbers = [row[self._fits[row]] for row in members]
        other = stack_rows([[self._mismatch(i) for i in row.tolist()] for row in numbers], length)
        return [
            Located(own, places_of(own, members, self._starts)),
            Located(other, places_of(other, numbers, self._mismatched)),
        ]

    def _mismatch(self, number: int) -> TokenizedExample:
        return mismatched(self._example(number), self._example((number + 1) % len(self._fits)))

    def _reference(self, located: Located) -> np.ndarray:
        values = np.zeros(located.places.shape, np.float32)
        if self.table is not None:
            counts = located.places >= 0
            values[counts] = self.table[located.places[counts]]
        return values


def _begins(store: TokenStore) -> np.ndarray:
    """Where the first target of each example is, int64 [n]."""
    return np.array([np.argmax(example.weights != 0) for example in store], np.int64)


def mismatched(asked: TokenizedExample, answered: TokenizedExample) -> TokenizedExample:
    """The prompt of one example with the answer of another: from its first target on."""
    begin, rest = (int(np.argmax(example.weights != 0)) for example in (asked, answered))
    join = lambda name: np.concatenate([getattr(asked, name)[:begin], getattr(answered, name)[rest:]])
    return replace(
        asked,
        ids=join("ids"),
        completion=join("completion"),
        weights=join("weights"),
        prompt_length=min(asked.prompt_length, begin),
        source=f"{asked.source} with the answer of {answered.source}",
    )
