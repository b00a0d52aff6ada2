"""Training data that are pairs of answers to one prompt, each pair in one row."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np

from jaxsteer.groups import Group, Grouped, shared_length, stack_groups
from jaxsteer.objectives import Pairs
from jaxsteer.types import Batch
from train.data.encoding import OnLong, Report
from train.data.examples import TokenizedExample
from train.data.packing import RowOrder
from train.data.store import TokenStore, check_kept


class Located(NamedTuple):
    """A batch, numpy [B, T], and where its tokens are in a table of log-probabilities: int64 [B, T], -1 for those that
    do not count."""

    batch: Batch
    places: np.ndarray


class Layout(NamedTuple):
    """How rows are made: rows of a batch, tokens of a row, the seed of their order, and whether several examples share
    a row."""

    batch_size: int
    sequence_length: int
    seed: int = 0
    pack: bool = True

    def order(self, lengths: np.ndarray) -> RowOrder:
        """The order of items of these lengths."""
        return RowOrder(lengths, *self)


@dataclass(frozen=True, eq=False)
class PairSource:
    """Training batches of pairs: a chosen and a rejected answer to one prompt, in one row.

    chosen, rejected  the answers, pair by pair, each pair of at most `layout.sequence_length` tokens
    layout   how rows are made of pairs
    shared   write the prompt of a pair once, see `jaxsteer.groups`
    table    log-probabilities by the reference, fp32 [counted]; None for zeros
    """

    chosen: TokenStore
    rejected: TokenStore
    layout: Layout
    shared: bool = True
    table: np.ndarray | None = None
    order: RowOrder = field(init=False, repr=False)
    """Which pairs are in each row."""
    _trunks: np.ndarray = field(init=False, repr=False)  # tokens of each pair's trunk
    _starts: np.ndarray = field(init=False, repr=False)  # where each answer begins in the table, 2 i and 2 i + 1

    def __post_init__(self) -> None:
        """Lay out the rows."""
        trunks = trunks_of(self.chosen, self.rejected) if self.shared else np.zeros(len(self.chosen), np.int32)
        lengths = self.chosen.lengths + self.rejected.lengths - trunks
        counts = np.stack([counted(self.chosen), counted(self.rejected)], axis=1).reshape(-1)
        object.__setattr__(self, "order", self.layout.order(lengths))
        object.__setattr__(self, "_trunks", trunks)
        object.__setattr__(self, "_starts", np.append(0, np.cumsum(counts, dtype=np.int64)))

    @property
    def batch_size(self) -> int:
        """Rows of a step."""
        return self.layout.batch_size

    @property
    def examples(self) -> Sequence[TokenizedExample]:
        """The chosen answers."""
        return self.chosen

    @property
    def fill(self) -> float:
        """Fraction of an epoch's tokens that are not padding, 0 to 1."""
        return self.order.fill

    @property
    def counted(self) -> int:
        """Number of tokens that count, in all answers."""
        return int(self._starts[-1])

    @property
    def lengths(self) -> tuple[np.ndarray, np.ndarray]:
        """The number of tokens that count of each chosen, and of each rejected answer."""
        counts = np.diff(self._starts)
        return counts[::2], counts[1::2]

    def sums(self, table: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The sum over the tokens of each chosen, and of each rejected answer, of a table [counted]."""
        both = np.add.reduceat(table.astype(np.float64), self._starts[:-1])
        return both[::2], both[1::2]

    def steps(self, epochs: float) -> int:
        """Number of batches in this many epochs; the last batch may extend into the next epoch."""
        return self.order.steps(epochs)

    def referenced(self, table: np.ndarray) -> PairSource:
        """The source with the log-probabilities by the reference in its batches."""
        return replace(self, table=table)

    def batch(self, step: int, rows: Iterable[int] | None = None) -> Pairs:
        """The pairs of a step, numpy [B, T]."""
        members = self.order.members(step, rows)
        grouped = self._grouped(members)
        sign = np.where(grouped.member == 1, 1, -1) * (grouped.member > 0)
        places = self._places(grouped.batch, members)
        reference = np.zeros(places.shape, np.float32)
        if self.table is not None:
            reference[places >= 0] = self.table[places[places >= 0]]
        fields: Any = (grouped.group, sign.astype(np.float32), reference)
        return Pairs(grouped.batch, *fields)

    def located(self, step: int, rows: Iterable[int] | None = None) -> list[Located]:
        """What the reference sees of a step."""
        members = self.order.members(step, rows)
        batch = self._grouped(members).batch
        return [Located(batch, self._places(batch, members))]

    def digest(self) -> str:
        """sha256, in hexadecimal, of all that training sees of the pairs."""
        return hashlib.sha256(f"{self.chosen.digest()} {self.rejected.digest()}".encode()).hexdigest()

    @property
    def files(self) -> list[str]:
        """The files that the pairs come from; the first few."""
        return self.chosen.files

    def named(self, step: int) -> list[list[str]]:
        """The sources of the pairs in each row of a step."""
        return [[self.chosen.source(int(i)) for i in row] for row in self.order.members(step)]

    def _grouped(self, members: Sequence[np.ndarray]) -> Grouped:
        group = lambda i: Group((self.chosen[i], self.rejected[i]), int(self._trunks[i]))
        rows = [[group(i) for i in row.tolist()] for row in members]
        return stack_groups(rows, self.layout.sequence_length, trunks=self.shared)

    def _places(self, batch: Batch, members: Sequence[np.ndarray]) -> np.ndarray:
        answers = [np.stack([2 * row, 2 * row + 1], axis=1).reshape(-1) for row in members]
        return places_of(batch, answers, self._starts)


def places_of(batch: Batch, answers: Sequence[np.ndarray], starts: np.ndarray) -> np.ndarray:
    """Where the tokens that count of a batch [B, T] are in a table of all answers; -1 for the others.

    Args:
        batch: the answers of each row, one after another.
        answers: their numbers.
        starts: where each answer begins in the table, and the end.
    """
    places = np.full(batch.tokens.shape, -1, np.int64)
    for r, row in enumerate(answers):
        spans = [np.arange(starts[i], starts[i + 1]) for i in row.tolist()]
        places[r, np.asarray(batch.weights[r]) != 0] = np.concatenate([np.empty(0, np.int64), *spans])
    return places


def counted(store: TokenStore) -> np.ndarray:
    """The number of tokens of each example that count as targets, int64 [n]: never its first token."""
    return np.array([np.count_nonzero(example.weights[1:]) for example in store], np.int64)


def trunks_of(chosen: TokenStore, rejected: TokenStore) -> np.ndarray:
    """The tokens that the two answers of each pair can share, int32 [n]."""
    return np.array([shared_length(pair) for pair in zip(chosen, rejected, strict=True)], np.int32)


class FittingPairs(NamedTuple):
    """The pairs that fit a row, and statistics of all."""

    chosen: TokenStore
    rejected: TokenStore
    report: Report


def fitting_pairs(
    chosen: TokenStore, rejected: TokenStore, limit: int, on_long: OnLong, *, shared: bool
) -> FittingPairs:
    """The pairs that fit a row, and statistics of all.

    Args:
        chosen, rejected: the answers, pair by pair.
        limit: maximum number of tokens of a pair.
        on_long: what happens to longer pairs; they cannot be cut.
        shared: whether the prompt of a pair is counted once.

    Raises:
        ValueError: chosen and rejected answers that are no pairs, answers that are equal as tokens, pairs that are too
            long, or none that is left.
    """
    if on_long == "cut":
        raise ValueError("--on-long cut: pairs cannot be cut; use --on-long drop")
    _check_pairs(chosen, rejected)
    lengths = chosen.lengths + rejected.lengths - (trunks_of(chosen, rejected) if shared else 0)
    over = lengths > limit
    named = tuple((chosen.source(i), int(lengths[i])) for i in np.flatnonzero(over).tolist())
    kept = np.flatnonzero(~over)
    sides = [replace(store, chosen=store.chosen[kept]) for store in (chosen, rejected)]
    tokens = int(lengths[kept].sum(dtype=np.int64))
    supervised = sum(side.supervised() for side in sides) if len(kept) else 0
    notes = chosen.take(lambda part: part.notes) | rejected.take(lambda part: part.notes)
    begun, ended, straddled = (int(np.count_nonzero(notes & bit)) for bit in (1, 2, 4))
    report = Report(len(chosen), tokens, supervised, int(lengths.max()), limit, named, (), begun, ended, straddled)
    check_kept(report, on_long)
    return FittingPairs(sides[0], sides[1], report)


def _check_pairs(chosen: TokenStore, rejected: TokenStore) -> None:
    """Refuse answers that are no pairs, or equal as tokens."""
    paired = len(chosen) == len(rejected)
    if not paired or any(chosen.source(i) != rejected.source(i) for i in range(len(chosen))):
        raise ValueError(
            f"{', '.join(chosen.files or rejected.files)}: has {len(chosen):,} wanted and {len(rejected):,} unwanted "
            "answers, which are no pairs; answers that are judged one by one are for --preference.kind kto"
        )
    for i, (a, b) in enumerate(zip(chosen, rejected, strict=True)):
        if np.array_equal(a.ids, b.ids):
            raise ValueError(f"{chosen.source(i)}: the chosen and the rejected answer have the same tokens")
