"""Rows of fixed length from examples of any length, in an order that is a pure function of (seed, step)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import numpy as np

from jaxsteer.batches import bucket_length, pack, stack_rows
from jaxsteer.types import Batch
from train.data.examples import TokenizedExample


@dataclass(frozen=True, eq=False)
class DataSource:
    """Training batches of [rows, length] tokens; `batch(step)` is a function of examples, settings and step.

    Rows are laid out once, by packing one shuffle of the examples. An epoch deals the examples anew to the
    places of their own length and shuffles the rows, so every epoch has every example exactly once, other
    neighbours, and the same number of rows: that number is what lets any step be found without the ones
    before it. Epochs follow one another without a gap: a batch may end one and begin the next, so that
    nothing is dropped and every batch is full.

    examples  the data; each at most `length` long
    rows      rows of a batch (B)
    length    tokens of a row (T)
    seed      of the order
    pack      False = one example a row, the rest padding; for comparison
    """

    examples: Sequence[TokenizedExample]
    rows: int
    length: int
    seed: int = 0
    pack: bool = True
    _lengths: np.ndarray = field(init=False, repr=False)
    _layout: list[np.ndarray] = field(init=False, repr=False)  # per row: its places
    _places: np.ndarray = field(init=False, repr=False)  # all places, by the length they hold
    _epochs: dict[int, tuple[np.ndarray, np.ndarray]] = field(init=False, repr=False, default_factory=dict)

    def __post_init__(self) -> None:
        """Check the settings and lay out the rows."""
        if self.rows < 1 or self.length < 1:
            raise ValueError(f"data: got {self.rows} rows of {self.length} tokens, need at least 1 and 1")
        if not 0 <= self.seed < 2**64:
            raise ValueError(f"data seed: got {self.seed}, need 0 to 2**64 - 1")
        if not len(self.examples):
            raise ValueError("data: no examples")
        lengths = np.array([len(e) for e in self.examples])
        worst = int(lengths.argmax())
        if lengths[worst] > self.length:
            raise ValueError(
                f"{self.examples[worst].source}: {lengths[worst]} tokens do not fit a row of {self.length}; "
                "raise the row length, or tokenise with max_length and on_long='drop'"
            )
        shuffle = _generator(self.seed, 0).permutation(len(lengths))
        packed = pack(lengths[shuffle].tolist(), self.length) if self.pack else [[i] for i in range(len(lengths))]
        # A place is numbered by the example that the first shuffle put there.
        object.__setattr__(self, "_lengths", lengths)
        object.__setattr__(self, "_layout", [shuffle[row] for row in packed])
        object.__setattr__(self, "_places", np.argsort(lengths, kind="stable"))

    @property
    def rows_per_epoch(self) -> int:
        """Number of rows that hold every example once."""
        return len(self._layout)

    @property
    def steps_per_epoch(self) -> int:
        """Number of batches after which every example has been seen."""
        return self.steps(1)

    def steps(self, epochs: float) -> int:
        """Number of batches for so many epochs; the last may reach into the next one by less than a batch."""
        # The rounding keeps 0.1 * 30 rows from becoming 3.0000000000000004 of them.
        return math.ceil(round(epochs * self.rows_per_epoch / self.rows, 6))

    @property
    def fill(self) -> float:
        """Share of real tokens among all tokens of an epoch, 0 to 1."""
        return float(self._lengths.sum()) / (self.rows_per_epoch * self.length)

    def row_members(self, step: int, rows: Iterable[int] | None = None) -> list[list[int]]:
        """For each row of a batch (or each of `rows`, counted in it) the indices of the examples in it."""
        if step < 0:
            raise ValueError(f"data: got step {step}, need 0 or more")
        members = []
        for row in range(self.rows) if rows is None else rows:
            epoch, i = divmod(step * self.rows + row, self.rows_per_epoch)
            dealt, order = self._epoch(epoch)
            members.append(dealt[self._layout[order[i]]].tolist())
        return members

    def batch(self, step: int, rows: Iterable[int] | None = None) -> Batch:
        """The batch of one step, numpy, every field [rows, length]; any step, without the ones before it.

        Args:
            step: from 0.
            rows: only these rows of it, e.g. those that the devices of one process hold.
        """
        members = self.row_members(step, rows)
        return stack_rows([[self.examples[i] for i in row] for row in members], self.length)

    def _epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """(the example in each place, the order of the rows) of one epoch; two epochs are remembered."""
        if epoch not in self._epochs:
            generator = _generator(self.seed, epoch + 1)
            shuffle = generator.permutation(len(self._lengths))
            dealt = np.empty_like(shuffle)
            dealt[self._places] = shuffle[np.argsort(self._lengths[shuffle], kind="stable")]
            while len(self._epochs) > 1:
                self._epochs.pop(min(self._epochs))
            self._epochs[epoch] = dealt, generator.permutation(self.rows_per_epoch)
        return self._epochs[epoch]


def _generator(seed: int, stream: int) -> np.random.Generator:
    """Independent random numbers for each (seed, stream): Philox is a function of its key and a counter."""
    return np.random.Generator(np.random.Philox(key=np.array([seed, stream], np.uint64)))


class PromptBatch(NamedTuple):
    """Prompts of similar length, one a row.

    batch    numpy Batch [n, T]; rows without a prompt are all zeros (segment 0)
    indices  int32 [n], each row's index in the prompts given; -1 for a row without a prompt
    """

    batch: Batch
    indices: np.ndarray


def prompt_batches(
    prompts: Sequence[TokenizedExample],
    rows: int,
    *,
    side: Literal["left", "right"] = "left",
    lengths: Sequence[int] | None = None,
) -> Iterator[PromptBatch]:
    """Batches of all prompts, the longest first, so that too little memory shows at once.

    Args:
        prompts: From `encode_prompts`.
        rows: Prompts in a batch (n); the last is filled up with empty rows.
        side: Where the padding goes. Left: all prompts end in the last column.
        lengths: Allowed lengths T, so that a program is compiled for a few shapes only; None = those of
            `bucket_length`.

    Yields:
        Batches of the smallest allowed length that holds their longest prompt.

    Raises:
        ValueError: where a prompt is longer than every allowed length; for bad settings.
    """
    if rows < 1:
        raise ValueError(f"prompt batches: got {rows} rows, need at least 1")
    if side not in ("left", "right"):
        raise ValueError(f"prompt batches: got side {side!r}, allowed are 'left' and 'right'")
    # Stable, so that prompts of one length keep their order.
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    for start in range(0, len(order), rows):
        chosen = order[start : start + rows]
        longest = prompts[chosen[0]]
        if lengths is None:
            length = bucket_length(len(longest))
        else:
            length = min((n for n in lengths if n >= len(longest)), default=0)
            if not length:
                raise ValueError(
                    f"{longest.source}: a prompt of {len(longest)} tokens, but the allowed lengths are "
                    f"{sorted(lengths)}; add a longer one"
                )
        empty = rows - len(chosen)
        batch = stack_rows([[prompts[i]] for i in chosen] + [[] for _ in range(empty)], length, left=side == "left")
        yield PromptBatch(batch, np.array(chosen + [-1] * empty, np.int32))
