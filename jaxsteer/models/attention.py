"""Attention behind one function: softmax(q kᵀ / √H + mask) v, grouped heads, segments, causal by position."""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxsteer.types import Array

CPU_ROWS = 4
"""Rows of a batch that attention takes at a time on CPU: their scores stay in the processor's cache."""


class Span(NamedTuple):
    """Where the tokens of one side of the attention stand: segments and positions, [B, T] or [B, S]."""

    segments: Array
    positions: Array


def visible(query: Span, key: Span) -> Array:
    """Which keys a query reads: its own segment (never padding), none later than itself. [..., T, S] bool."""
    same = query.segments[..., :, None] == key.segments[..., None, :]
    past = query.positions[..., :, None] >= key.positions[..., None, :]
    return same & past & (key.segments[..., None, :] > 0)


def attend_row(q: Array, k: Array, v: Array, query: Span, key: Span) -> Array:
    """Attention of one row as plain matmuls: q [T, N, H], k and v [S, K, H] -> [T, N, H].

    Query head n reads key/value head n // (N / K). Scores and softmax in at least fp32. A query that sees nothing
    (padding) gets the mean of v, which nothing reads.
    """
    T, N, H = q.shape
    S, K, _ = k.shape
    q = (q * H**-0.5).transpose(1, 0, 2).reshape(K, N // K * T, H)  # the query heads of a group share one matmul
    scores = jnp.einsum("kth,skh->kts", q, k, preferred_element_type=np.promote_types(q.dtype, np.float32))
    # Added, not selected: a sum has no derivative to compute, and a masked weight of 0 passes none on.
    bias = jnp.where(visible(query, key), 0.0, 0.5 * np.finfo(scores.dtype).min).astype(scores.dtype)
    scores = scores.reshape(K, N // K, T, S) + bias[None, None]
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype).reshape(K, N // K * T, S)
    return jnp.einsum("kts,skh->kth", weights, v).reshape(N, T, H).transpose(1, 0, 2)


def query_blocks(length: int) -> list[int]:
    """Where the blocks of queries begin, and the last one ends: up to 8 blocks of at least 64."""
    blocks = max(1, min(8, length // 64))
    return [length * i // blocks for i in range(blocks + 1)]


def causal_share(length: int) -> float:
    """Share of a row's [T, T] scores that this platform computes."""
    edges = query_blocks(length) if jax.default_backend() == "cpu" else [0, length]
    return sum((stop - start) * stop for start, stop in pairwise(edges)) / length**2


def attend_causal_row(q: Array, k: Array, v: Array, span: Span) -> Array:
    """`attend_row` of a row on itself, in blocks of queries that stop at the last key they may see.

    Tokens of an example stand in order within a row, so no query sees a key to its right: with four blocks that saves
    three eighths of the work.
    """
    edges = query_blocks(q.shape[0])
    upto = lambda stop, start=0: Span(span.segments[start:stop], span.positions[start:stop])
    return jnp.concatenate(
        [
            attend_row(q[start:stop], k[:stop], v[:stop], upto(stop, start), upto(stop))
            for start, stop in pairwise(edges)
        ]
    )


def attention(q: Array, k: Array, v: Array, query: Span, key: Span | None = None) -> Array:
    """Causal grouped-query attention within segments: q [B, T, N, H], k and v [B, S, K, H] -> [B, T, N, H].

    `key` tells where cached keys stand; without it the row attends to itself. On CPU the batch is mapped over a few
    rows at a time and rematerialised, so that scores stay in the processor's cache and are never stored. Free of custom
    derivative rules: jvp, vjp and any nesting of them pass through.
    """
    by_row = jax.default_backend() == "cpu" and q.shape[1] > 1
    if key is not None:
        if by_row:
            return jax.lax.map(lambda row: attend_row(*row), (q, k, v, query, key), batch_size=CPU_ROWS)
        return jax.vmap(attend_row)(q, k, v, query, key)
    if by_row:
        return jax.lax.map(jax.checkpoint(lambda row: attend_causal_row(*row)), (q, k, v, query), batch_size=CPU_ROWS)
    return jax.vmap(attend_row)(q, k, v, query, query)
