"""Batches: building them from token arrays, packing examples into rows, and selecting the tokens that a slot steers."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from jaxsteer.types import Array, Batch, Positions


def make_batch(
    tokens: Array, segments: Array | None = None, weights: Array | None = None, completion: Array | None = None
) -> Batch:
    """Build a batch: positions restart in every segment, and a prompt ends at the first completion token.

    Args:
        tokens: token ids, int [B, T].
        segments: int [B, T], 0 = padding, otherwise the number of the example within its row, at most T. Default: one
            example per row, no padding.
        weights: [B, T], any real, the weight of each token as a target in the loss. Default: no targets.
        completion: bool [B, T], the tokens that the model is to produce; decides which tokens are steered. Default:
            tokens of weight above 0.

    Returns:
        The batch. An example without completion tokens is all prompt.

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
    return _fill_in(tokens, segments, weights, completion)


@jax.jit
def _fill_in(tokens: Array, segments: Array, weights: Array, completion: Array) -> Batch:
    """The batch with positions and prompt lengths computed from the segments and the completion."""
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
    """The tokens that a slot steers, bool [B, T]; None if it steers all of them.

    Tokens are counted within their example, so packing, padding and decoding do not change the selection. `last` is
    each token from which a completion is predicted: the one before each span of completion tokens, and the last token
    of an example that ends with a prompt (where decoding starts).
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
        completion_next = jnp.pad(completion[:, 1:], ((0, 0), (0, 1)), constant_values=True)
        ends = ~same if batch.trunks is None else ~same & (batch.trunks != batch.segments)  # a trunk goes on elsewhere
        return real & ~completion & (ends | completion_next)
    half = batch.prompt_lengths // 2  # first:n and last:n never overlap, in one slot or in two
    from_end = batch.prompt_lengths - 1 - batch.positions
    first = batch.positions < jnp.minimum(positions.first, half)
    return prompt & (first | (from_end < jnp.minimum(positions.last, half)))


class Tokens(Protocol):
    """An example as token ids.

    ids            int32 [n]
    completion     bool [n], whether the token belongs to a completion
    weights        fp32 [n], each token's weight as a target; 0 = no target
    prompt_length  number of tokens before the first completion token; n if there is none
    source         where the example comes from, for error messages
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
        """Weights as targets in the loss."""
        ...

    @property
    def prompt_length(self) -> int:
        """Number of tokens before the first completion token."""
        ...

    @property
    def source(self) -> str:
        """Where the example comes from, for error messages."""
        ...


class Flat(NamedTuple):
    """Examples one after another: the fields of `Tokens`, joined.

    lengths         int [n], tokens of each example
    prompt_lengths  int32 [n]
    ids             int32 [tokens]
    completion      bool [tokens]
    weights         fp32 [tokens]
    """

    lengths: np.ndarray
    prompt_lengths: np.ndarray
    ids: np.ndarray
    completion: np.ndarray
    weights: np.ndarray

    @classmethod
    def of(cls, examples: Sequence[Tokens]) -> Flat:
        """Join examples."""
        joined = lambda dtype, fields: np.concatenate([np.empty(0, dtype), *fields], dtype=dtype, casting="unsafe")
        return cls(
            np.array([len(example.ids) for example in examples], np.int64),
            np.array([example.prompt_length for example in examples], np.int32),
            joined(np.int32, (example.ids for example in examples)),
            joined(np.bool_, (example.completion for example in examples)),
            joined(np.float32, (example.weights for example in examples)),
        )


def rows_of(lengths: Sequence[int], row_length: int) -> np.ndarray:
    """Pack items into rows by best fit: each item, in the order given, goes into the fullest row that can take it.

    Args:
        lengths: lengths of the items, each from 1 to row_length.
        row_length: capacity of a row.

    Returns:
        The row of each item, int32 [n]; rows are numbered from 0 without gaps.
    """
    chosen = array("i")
    # Rows by their free space, and the free spaces in use as the bits of one number: its lowest set bit from n upwards
    # is the tightest fit for an item of length n. An item costs row_length / 64 machine words and no search.
    rows_by_space: list[list[int]] = [[] for _ in range(row_length + 1)]
    spaces = rows = 0
    for length in lengths:
        if fitting := spaces >> length:
            space = length + (fitting & -fitting).bit_length() - 1
            row = rows_by_space[space].pop()
            if not rows_by_space[space]:
                spaces ^= 1 << space
        else:
            space, row, rows = row_length, rows, rows + 1
        chosen.append(row)
        rows_by_space[space - length].append(row)
        spaces |= 1 << (space - length)
    return np.array(chosen, np.int32)


def pack(lengths: Sequence[int], row_length: int) -> list[list[int]]:
    """The items of each row that `rows_of` makes, by their indices."""
    rows: list[list[int]] = []
    for item, row in enumerate(rows_of(lengths, row_length).tolist()):
        if row == len(rows):
            rows.append([])
        rows[row].append(item)
    return rows


def stack_rows(rows: Sequence[Sequence[Tokens]], length: int, *, left: bool = False) -> Batch:
    """Write examples into rows, one after another.

    Args:
        rows: the examples of each row; a row may be empty.
        length: T. What the examples leave free is padding, zero in every field.
        left: pad on the left instead of the right.

    Returns:
        A batch of numpy arrays [len(rows), length]. Segments count from 1 in each row, positions from 0 in each
        example. The first token of an example is neither completion nor target: nothing before it predicts it.

    Raises:
        ValueError: the examples of a row do not fit.
    """
    for r, row in enumerate(rows):
        total = sum(len(example.ids) for example in row)
        if total > length:
            raise ValueError(f"row {r} (from {row[0].source}): {total} tokens do not fit a row of {length}")
    flat = Flat.of([example for row in rows for example in row])
    return stack_flat(flat, [len(row) for row in rows], length, left=left)


def stack_flat(flat: Flat, members: Sequence[int], length: int, *, left: bool = False) -> Batch:
    """Write joined examples into rows, one after another; otherwise as `stack_rows`.

    Args:
        flat: the examples, in the order of the rows.
        members: number of examples in each row, whose tokens must fit.
        length: T.
        left: pad on the left instead of the right.
    """
    counts, ends = np.asarray(members, np.int64), np.cumsum(flat.lengths, dtype=np.int64)
    starts, last = ends - flat.lengths, np.cumsum(counts)
    spread = lambda values: np.repeat(np.asarray(values, np.int32), flat.lengths)
    total = int(ends[-1]) if len(ends) else 0
    completion, weights = flat.completion.copy(), flat.weights.copy()
    completion[starts], weights[starts] = False, 0
    fields = (
        flat.ids,
        spread(np.arange(len(ends)) - np.repeat(last - counts, counts) + 1),
        np.arange(total, dtype=np.int32) - spread(starts),
        spread(flat.prompt_lengths),
        completion,
        weights,
    )
    edges = np.append(0, ends)
    edges = edges[np.append(0, last)].tolist()  # where each row begins in the joined examples
    blank: Any = [np.zeros((len(counts), length), field.dtype) for field in fields]  # numpy on the host
    for r, (begin, end) in enumerate(pairwise(edges)):
        at = length - (end - begin) if left else 0
        for field, written in zip(fields, blank, strict=True):
            written[r, at : at + end - begin] = field[begin:end]
    return Batch(*blank)


def bucket_length(length: int, smallest: int = 16) -> int:
    """Round a length up to smallest · (1, 1.5, 2, 3, 4, 6, 8, 12, ...): two compiled shapes per doubling.

    Args:
        length: in tokens.
        smallest: the shortest length returned; even.
    """
    power = smallest
    while True:
        for bucket in (power, power + power // 2):
            if length <= bucket:
                return bucket
        power *= 2
