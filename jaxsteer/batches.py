"""Batches from plain token arrays, and which of their tokens a slot steers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from jaxsteer.types import Array, Batch, Positions


def make_batch(
    tokens: Array, segments: Array | None = None, weights: Array | None = None, completion: Array | None = None
) -> Batch:
    """Complete a batch: positions restart in every segment, the prompt ends at the first completion token.

    Args:
        tokens: int [B, T] token ids.
        segments: int [B, T], 0 = padding, otherwise the number of the example in its row (at most T); default: one
            example a row, no padding.
        weights: [B, T], any real, weight of each token as a target in the loss; default: nothing is supervised.
        completion: bool [B, T], the tokens that a model is to produce, for the selection of steered tokens; default:
            those of weight above 0.

    Returns:
        The batch. An example without a completion counts as prompt in its whole length.

    Raises:
        ValueError: the arrays are not all [B, T].
    """
    tokens = jnp.asarray(tokens, jnp.int32)
    segments = jnp.ones_like(tokens) if segments is None else jnp.asarray(segments, jnp.int32)
    weights = jnp.zeros(tokens.shape, jnp.float32) if weights is None else jnp.asarray(weights, jnp.float32)
    completion = weights > 0 if completion is None else jnp.asarray(completion, bool)
    if tokens.ndim != 2 or not tokens.shape == segments.shape == weights.shape == completion.shape:
        raise ValueError(
            f"a batch needs [B, T] arrays of one shape: tokens {tokens.shape}, segments {segments.shape}, "
            f"weights {weights.shape}, completion {completion.shape}"
        )
    length = tokens.shape[1]
    index = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), tokens.shape)
    new = jnp.pad(segments[:, 1:] != segments[:, :-1], ((0, 0), (1, 0)), constant_values=True)
    start = jax.lax.cummax(jnp.where(new, index, 0), axis=1)
    positions = jnp.where(segments > 0, index - start, 0)

    def first_completed(segments: Array, positions: Array, completion: Array) -> Array:  # one row, [T]
        ends = jnp.zeros(length + 1, jnp.int32).at[segments].max(positions + 1)
        firsts = ends.at[segments].min(jnp.where(completion, positions, length))
        return firsts[segments]

    prompt_lengths = jax.vmap(first_completed)(segments, positions, completion)
    return Batch(tokens, segments, positions, jnp.where(segments > 0, prompt_lengths, 0), completion, weights)


def select(positions: Positions, batch: Batch) -> Array | None:
    """The tokens that a slot steers, [B, T] bool; None when it steers all of them.

    Everything is counted inside the example, so packing, padding and decoding cannot change the selection. `last` is
    the token from which a completion is predicted: before each span of completion, and at the end of an example that
    ends with a prompt (where decoding would start).
    """
    if positions.kind == "all":
        return None
    real = batch.segments > 0
    completion = batch.completion & real
    prompt = (batch.positions < batch.prompt_lengths) & real
    if positions.kind == "prompt":
        return prompt
    if positions.kind == "completion":
        return completion
    if positions.kind == "last":
        same = jnp.pad(batch.segments[:, 1:] == batch.segments[:, :-1], ((0, 0), (0, 1)))
        speaks_next = jnp.pad(completion[:, 1:], ((0, 0), (0, 1)), constant_values=True)
        return real & ~completion & (~same | speaks_next)
    half = batch.prompt_lengths // 2  # so that first:n and last:n never overlap, in one slot or in two
    from_end = batch.prompt_lengths - 1 - batch.positions
    first = batch.positions < jnp.minimum(positions.first, half)
    return prompt & (first | (from_end < jnp.minimum(positions.last, half)))


class Tokens(Protocol):
    """An example as token ids.

    ids            int32 [n]
    completion     bool [n], whether the token belongs to a completion
    weights        fp32 [n], each token's weight as a target, 0 = no target
    prompt_length  number of tokens before the first of a completion; n where there is none
    source         where it came from, for messages
    """

    @property
    def ids(self) -> np.ndarray:
        """Token ids."""
        ...

    @property
    def completion(self) -> np.ndarray:
        """Which tokens belong to a completion."""
        ...

    @property
    def weights(self) -> np.ndarray:
        """Weights as targets."""
        ...

    @property
    def prompt_length(self) -> int:
        """Tokens before the first of a completion."""
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
        The first token of an example is no completion and has weight 0: nothing before it predicts it.

    Raises:
        ValueError: where the examples of a row are longer than it.
    """
    shape = (len(rows), length)
    tokens, segments, positions, prompt_lengths = (np.zeros(shape, np.int32) for _ in range(4))
    completion, weights = np.zeros(shape, bool), np.zeros(shape, np.float32)
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
            completion[r, span], weights[r, span] = example.completion, example.weights
            completion[r, at], weights[r, at] = False, 0
            at = span.stop
    fields: Any = (tokens, segments, positions, prompt_lengths, completion, weights)  # numpy on the host
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
