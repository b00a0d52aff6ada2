"""Attention behind one function: softmax(q kᵀ / √H + mask) v, grouped heads, segments, causal by position."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxsteer.types import Array


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
    scores = jnp.einsum("kth,skh->kts", q, k, preferred_element_type=jnp.promote_types(q.dtype, jnp.float32))
    scores = jnp.where(visible(query, key)[None, None], scores.reshape(K, N // K, T, S), jnp.finfo(scores.dtype).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype).reshape(K, N // K * T, S)
    return jnp.einsum("kts,skh->kth", weights, v).reshape(N, T, H).transpose(1, 0, 2)


def attention(q: Array, k: Array, v: Array, query: Span, key: Span) -> Array:
    """Causal grouped-query attention within segments: q [B, T, N, H], k and v [B, S, K, H] -> [B, T, N, H].

    On CPU the rows of the batch are mapped over one at a time: the scores of a row stay in the processor's cache
    (SmolLM2, 8 rows of 256: half the time of one batched product). Free of custom derivative rules, so that jvp,
    vjp and any nesting of them pass through.
    """
    if jax.default_backend() == "cpu" and q.shape[0] > 1 and q.shape[1] > 1:
        return jax.lax.map(lambda row: attend_row(*row), (q, k, v, query, key))
    return jax.vmap(attend_row)(q, k, v, query, key)
