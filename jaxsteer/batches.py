"""Batches from plain token arrays, and which of their tokens a slot steers."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxsteer.types import Array, Batch, Positions


def make_batch(tokens: Array, segments: Array | None = None, weights: Array | None = None) -> Batch:
    """Complete a batch: positions restart in every segment, the prompt ends at the first supervised token.

    Args:
        tokens: int [B, T] token ids.
        segments: int [B, T], 0 = padding, otherwise the number of the example in its row (at most T); default: one
            example a row, no padding.
        weights: [B, T] weight of each token as a target; default: nothing is supervised, all is prompt.

    Returns:
        The batch. An example with no supervised token counts as prompt in its whole length.

    Raises:
        ValueError: the arrays are not all [B, T].
    """
    tokens = jnp.asarray(tokens, jnp.int32)
    segments = jnp.ones_like(tokens) if segments is None else jnp.asarray(segments, jnp.int32)
    weights = jnp.zeros(tokens.shape, jnp.float32) if weights is None else jnp.asarray(weights, jnp.float32)
    if tokens.ndim != 2 or not tokens.shape == segments.shape == weights.shape:
        raise ValueError(
            "a batch needs [B, T] arrays of one shape: "
            f"tokens {tokens.shape}, segments {segments.shape}, weights {weights.shape}"
        )
    length = tokens.shape[1]
    index = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), tokens.shape)
    new = jnp.pad(segments[:, 1:] != segments[:, :-1], ((0, 0), (1, 0)), constant_values=True)
    start = jax.lax.cummax(jnp.where(new, index, 0), axis=1)
    positions = jnp.where(segments > 0, index - start, 0)

    def first_supervised(segments: Array, positions: Array, supervised: Array) -> Array:  # one row, [T]
        ends = jnp.zeros(length + 1, jnp.int32).at[segments].max(positions + 1)
        firsts = ends.at[segments].min(jnp.where(supervised, positions, length))
        return firsts[segments]

    prompt_lengths = jax.vmap(first_supervised)(segments, positions, weights > 0)
    return Batch(tokens, segments, positions, jnp.where(segments > 0, prompt_lengths, 0), weights)


def select(positions: Positions, batch: Batch) -> Array | None:
    """The tokens that a slot steers, [B, T] bool; None when it steers all of them.

    Everything is counted inside the example, so packing, padding and decoding cannot change the selection. `last` is
    the token from which a completion is predicted: before each supervised span, and at the end of an example that
    ends unsupervised (where decoding would start).
    """
    if positions.kind == "all":
        return None
    real = batch.segments > 0
    completion = (batch.weights > 0) & real
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
