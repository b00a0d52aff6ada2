"""Packing: rows of fixed length from examples of any length, in an order that is a pure function of (seed, step)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache

import numpy as np

from jaxsteer.batches import rows_of, stack_flat
from jaxsteer.types import Batch
from train.data.examples import TokenizedExample
from train.data.store import TokenStore


@dataclass(frozen=True, eq=False)
class RowOrder:
    """Which items are in each row of each step: a pure function of their lengths, the settings and the step.

    The layout of the rows is fixed once, by packing one shuffle of the items. Each epoch then permutes the items among
    the places of equal length and shuffles the rows. So every epoch has every item exactly once, with other neighbours,
    and the same number of rows, which is what allows random access to any step. Epochs follow one another without a
    gap: a batch may end one epoch and begin the next, so nothing is dropped and every batch is full.

    lengths          tokens of each item, int [n], each from 1 to `sequence_length`
    batch_size       rows per batch (B)
    sequence_length  tokens per row (T)
    seed             random seed of the order
    pack             pack several items into a row; False puts one into each
    """

    lengths: np.ndarray
    batch_size: int
    sequence_length: int
    seed: int = 0
    pack: bool = True
    _layout: np.ndarray = field(init=False, repr=False)  # the places of all rows, row after row
    _rows: np.ndarray = field(init=False, repr=False)  # where each row begins in the layout, and the end
    _places: np.ndarray = field(init=False, repr=False)  # all places, sorted by the length of their item
    _epoch: Callable[[int], tuple[np.ndarray, np.ndarray]] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        """Check the settings and lay out the rows."""
        if self.batch_size < 1 or self.sequence_length < 1:
            raise ValueError(
                f"data: got batch_size {self.batch_size} and sequence_length {self.sequence_length}, "
                "both must be at least 1"
            )
        if not 0 <= self.seed < 2**64:
            raise ValueError(f"data seed: got {self.seed}, need 0 to 2**64 - 1")
        if not len(self.lengths):
            raise ValueError("data: no examples")
        lengths = self.lengths
        shuffle = generator(self.seed, 0).permutation(len(lengths)).astype(np.int32)
        rows = rows_of(lengths[shuffle].tolist(), self.sequence_length) if self.pack else np.arange(len(lengths))
        # A place is numbered by the item that the first shuffle put there.
        if self.sequence_length < 2**16:
            lengths = lengths.astype(np.uint16)  # which NumPy sorts by radix
        object.__setattr__(self, "lengths", lengths)
        object.__setattr__(self, "_layout", shuffle[np.argsort(rows, kind="stable")])
        object.__setattr__(self, "_rows", np.append(0, np.cumsum(np.bincount(rows))).astype(np.int32))
        object.__setattr__(self, "_places", np.argsort(lengths, kind="stable").astype(np.int32))
        # The last two epochs are cached: one batch may need both. Batches may be made in another thread.
        object.__setattr__(self, "_epoch", lru_cache(maxsize=2)(self._make_epoch))

    @property
    def rows_per_epoch(self) -> int:
        """Number of rows that hold every item once."""
        return len(self._rows) - 1

    def steps(self, epochs: float) -> int:
        """Number of batches in this many epochs; the last batch may extend into the next epoch."""
        # Rounded, so that 0.1 * 30 rows are not 3.0000000000000004 rows.
        return math.ceil(round(epochs * self.rows_per_epoch / self.batch_size, 6))

    @property
    def fill(self) -> float:
        """Fraction of an epoch's tokens that are not padding, 0 to 1."""
        return float(self.lengths.sum(dtype=np.int64)) / (self.rows_per_epoch * self.sequence_length)

    def members(self, step: int, rows: Iterable[int] | None = None) -> list[np.ndarray]:
        """Indices of the items in each row of a batch, int [...] each.

        Args:
            step: from 0.
            rows: only these rows, numbered within the batch; None for all.

        Raises:
            ValueError: a negative step.
        """
        if step < 0:
            raise ValueError(f"data: got step {step}, need 0 or more")
        members = []
        for row in range(self.batch_size) if rows is None else rows:
            epoch, index = divmod(step * self.batch_size + row, self.rows_per_epoch)
            placed, order = self._epoch(epoch)
            begin, end = self._rows[order[index] : order[index] + 2]
            members.append(placed[self._layout[begin:end]])
        return members

    def _make_epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """(the item in each place, the order of the rows) in one epoch."""
        random = generator(self.seed, epoch + 1)
        shuffle = random.permutation(len(self.lengths)).astype(np.int32)
        placed = np.empty_like(shuffle)
        placed[self._places] = shuffle[np.argsort(self.lengths[shuffle], kind="stable")]
        return placed, random.permutation(self.rows_per_epoch).astype(np.int32)


@dataclass(frozen=True, eq=False)
class DataSource:
    """Training batches [batch_size, sequence_length]; `batch(step)` is a pure function of examples, settings and step.

    examples         the data, each of at most `sequence_length` tokens
    batch_size, sequence_length, seed, pack  as for `RowOrder`, of the examples
    """

    examples: Sequence[TokenizedExample]
    batch_size: int
    sequence_length: int
    seed: int = 0
    pack: bool = True
    store: TokenStore = field(init=False, repr=False)
    """The examples, as arrays."""
    order: RowOrder = field(init=False, repr=False)
    """Which of them are in each row."""

    def __post_init__(self) -> None:
        """Check the settings and lay out the rows."""
        store = TokenStore.of(self.examples) if len(self.examples) else None
        lengths = np.empty(0, np.int32) if store is None else store.lengths
        if store is not None and lengths.max() > self.sequence_length > 0:
            longest = int(lengths.argmax())
            raise ValueError(
                f"{store.source(longest)}: {lengths[longest]} tokens do not fit a row of "
                f"{self.sequence_length}; raise --sequence-length, or use --on-long drop"
            )
        order = RowOrder(lengths, self.batch_size, self.sequence_length, self.seed, self.pack)
        object.__setattr__(self, "store", store)
        object.__setattr__(self, "order", order)

    def ordered_by(self, seed: int) -> DataSource:
        """The same examples in another order."""
        return replace(self, seed=seed)

    @property
    def rows_per_epoch(self) -> int:
        """Number of rows that hold every example once."""
        return self.order.rows_per_epoch

    def steps(self, epochs: float) -> int:
        """Number of batches in this many epochs; the last batch may extend into the next epoch."""
        return self.order.steps(epochs)

    @property
    def fill(self) -> float:
        """Fraction of an epoch's tokens that are not padding, 0 to 1."""
        return self.order.fill

    def row_members(self, step: int, rows: Iterable[int] | None = None) -> list[list[int]]:
        """Indices of the examples in each row of a batch; as `RowOrder.members`."""
        return [row.tolist() for row in self.order.members(step, rows)]

    def batch(self, step: int, rows: Iterable[int] | None = None) -> Batch:
        """The batch of one step as numpy arrays, computed without the batches before it.

        Args:
            step: from 0.
            rows: only these rows of it, e.g. those that the devices of one process hold; None for all.

        Returns:
            Batch, every field [batch_size, sequence_length], or [len(rows), sequence_length].

        Raises:
            ValueError: a negative step.
        """
        members = self.order.members(step, rows)
        flat = self.store.flat(np.concatenate([np.empty(0, np.int32), *members]))
        return stack_flat(flat, [len(row) for row in members], self.sequence_length)

    def digest(self) -> str:
        """sha256, in hexadecimal, of all that the loss and the steering see of the examples."""
        return self.store.digest()

    @property
    def files(self) -> list[str]:
        """The files (or data sets) that the examples come from; the first few."""
        return self.store.files

    def named(self, step: int) -> list[list[str]]:
        """The sources of the examples in each row of a step's batch."""
        return [[self.store.source(index) for index in row] for row in self.row_members(step)]


def generator(seed: int, stream: int) -> np.random.Generator:
    """An independent random generator for each (seed, stream); Philox is keyed by both."""
    return np.random.Generator(np.random.Philox(key=np.array([seed, stream], np.uint64)))
