"""Rows of fixed length from examples of any length: which share a row, and what the row then holds (numpy)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from jaxsteer.types import Batch


class Tokens(Protocol):
    """An example as token ids.

    ids            int32 [n]
    weights        fp32 [n], each token's weight as a target
    prompt_length  number of tokens before the first supervised one; n where none is
    source         where it came from, for messages
    """

    @property
    def ids(self) -> np.ndarray:
        """Token ids."""
        ...

    @property
    def weights(self) -> np.ndarray:
        """Weights as targets."""
        ...

    @property
    def prompt_length(self) -> int:
        """Tokens before the first supervised one."""
        ...

    @property
    def source(self) -> str:
        """For messages."""
        ...


def pack(lengths: Sequence[int], row_length: int) -> list[list[int]]:
    """Put items into rows, each into the fullest row that has room for it (best fit), in the order given.

    Args:
        lengths: Of the items, each from 1 to row_length.
        row_length: Room in a row.

    Returns:
        For each row the indices of its items.
    """
    rows: list[list[int]] = []
    # Rows by the room they have left, and the same as bits of one number: the lowest set bit from n upwards
    # is the tightest room for n, so an item costs row_length / 64 machine words and no search.
    by_room: list[list[int]] = [[] for _ in range(row_length + 1)]
    rooms = 0
    for i, n in enumerate(lengths):
        fitting = rooms >> n
        if fitting:
            room = n + (fitting & -fitting).bit_length() - 1
            row = by_room[room].pop()
            if not by_room[room]:
                rooms ^= 1 << room
        else:
            room, row = row_length, len(rows)
            rows.append([])
        rows[row].append(i)
        by_room[room - n].append(row)
        rooms |= 1 << (room - n)
    return rows


def stack_rows(rows: Sequence[Sequence[Tokens]], length: int, *, left: bool = False) -> Batch:
    """Write examples into rows one after another.

    Args:
        rows: Examples of each row; a row may be empty.
        length: T; what examples do not fill is padding: zeros in every field.
        left: Put the padding before the examples instead of after them.

    Returns:
        numpy Batch, [len(rows), length]. Segments count from 1 in each row, positions from 0 in each example.
        The first token of an example has weight 0: nothing before it predicts it.

    Raises:
        ValueError: where the examples of a row are longer than it.
    """
    shape = (len(rows), length)
    tokens, segments, positions, prompt_lengths = (np.zeros(shape, np.int32) for _ in range(4))
    weights = np.zeros(shape, np.float32)
    for r, row in enumerate(rows):
        total = sum(len(example.ids) for example in row)
        if total > length:
            raise ValueError(f"row {r} (from {row[0].source}): {total} tokens do not fit a row of {length}")
        at = length - total if left else 0
        for segment, example in enumerate(row, 1):
            span = slice(at, at + len(example.ids))
            tokens[r, span] = example.ids
            segments[r, span] = segment
            positions[r, span] = np.arange(len(example.ids))
            prompt_lengths[r, span] = example.prompt_length
            weights[r, span] = example.weights
            weights[r, at] = 0
            at = span.stop
    fields: Any = (tokens, segments, positions, prompt_lengths, weights)  # numpy on the host
    return Batch(*fields)


def bucket_length(length: int, smallest: int = 16) -> int:
    """The next of smallest · (1, 1.5, 2, 3, 4, 6, 8, 12, ...): two shapes for each doubling of the length.

    Args:
        length: In tokens.
        smallest: Even; the shortest length returned.
    """
    power = smallest
    while True:
        for bucket in (power, power + power // 2):
            if length <= bucket:
                return bucket
        power *= 2
