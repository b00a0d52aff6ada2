"""Attention behind one function: softmax(q kᵀ / √H + mask) v, grouped heads, segments, causal by position, and
where a family has them: another scale, soft-capped scores, a window.

Several kernels compute it; `choose_attention` says which one runs where.
"""

from __future__ import annotations

from functools import partial
from itertools import pairwise
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np

from jaxsteer.models.splash import splash_attention, splash_refusal
from jaxsteer.sharding import current_mesh, current_platform
from jaxsteer.types import Array

Kernel = Literal["auto", "rows", "dense", "chunked", "cudnn", "splash"]
"""How attention of rows on themselves is computed.

auto     what `choose_attention` says
rows     XLA, a few rows at a time in causal blocks of queries: for one CPU
dense    XLA, all scores at once
chunked  XLA, one chunk of queries after another, recomputed by the backward pass: scores are never stored
cudnn    cuDNN's fused kernel (NVIDIA)
splash   the Pallas kernel (TPU)

Forward-mode derivatives pass through the XLA kernels alone.
"""

CHUNK = 512
"""Queries that the chunked kernel takes at a time."""

CPU_ROWS = 4
"""Rows of a batch that attention takes at a time on CPU: their scores stay in the processor's cache."""


class Span(NamedTuple):
    """Where the tokens of one side of the attention stand: segments and positions, [B, T] or [B, S]."""

    segments: Array
    positions: Array


class Scores(NamedTuple):
    """How scores come from queries and keys.

    scale    factor on q · k; None = 1/√H
    softcap  scores s become c · tanh(s / c)
    window   a query reads so many tokens, itself included
    local    whether the window holds in this layer, a bool or bool []
    """

    scale: float | None = None
    softcap: float | None = None
    window: int | None = None
    local: Array | bool = True

    def queries(self, q: Array) -> Array:
        """Scaled, so that q · k is the score."""
        return q * (q.shape[-1] ** -0.5 if self.scale is None else self.scale)


PLAIN = Scores()


def visible(query: Span, key: Span, scores: Scores = PLAIN) -> Array:
    """Which keys a query reads: its own segment (never padding), none later than itself or outside of the window.

    Bool [..., T, S].
    """
    same = query.segments[..., :, None] == key.segments[..., None, :]
    distance = query.positions[..., :, None] - key.positions[..., None, :]
    seen = same & (distance >= 0) & (key.segments[..., None, :] > 0)
    if scores.window is not None:
        seen &= (distance < scores.window) | jnp.logical_not(scores.local)
    return seen


def attend_row(q: Array, k: Array, v: Array, query: Span, key: Span, how: Scores = PLAIN) -> Array:
    """Attention of one row as plain matmuls: q [T, N, H], k and v [S, K, H] -> [T, N, H].

    Query head n reads key/value head n // (N / K). Scores and softmax in at least fp32. A query that sees nothing
    (padding) gets the mean of v, which nothing reads.
    """
    T, N, H = q.shape
    K = k.shape[1]
    q = how.queries(q).transpose(1, 0, 2).reshape(K, N // K * T, H)  # the query heads of a group share one matmul
    scores = jnp.einsum("kth,skh->kts", q, k, preferred_element_type=np.promote_types(q.dtype, np.float32))
    weights = _weights(scores, visible(query, key, how), how).astype(v.dtype)
    return jnp.einsum("kts,skh->kth", weights, v).reshape(N, T, H).transpose(1, 0, 2)


class Held(NamedTuple):
    """Keys and values as they lie in a cache, k and v [B, K, S, H], and where they stand."""

    k: Array
    v: Array
    span: Span


def attend_held_row(q: Array, query: Span, *parts: Held, how: Scores = PLAIN) -> Array:
    """`attend_row` to several stores of keys: q [T, N, H], k and v of each [K, S, H], S its own.

    Scores are joined, which are small; keys and values would have to be copied.
    """
    T, N, H = q.shape
    K = parts[0].k.shape[0]
    q = how.queries(q).transpose(1, 0, 2).reshape(K, N // K * T, H)
    wide = np.promote_types(q.dtype, np.float32)
    scores = [jnp.einsum("kth,ksh->kts", q, part.k, preferred_element_type=wide) for part in parts]
    seen = jnp.concatenate([visible(query, part.span, how) for part in parts], axis=-1)
    weights = _weights(jnp.concatenate(scores, axis=-1), seen, how).astype(q.dtype)
    edges = np.cumsum([part.k.shape[1] for part in parts])[:-1]
    read = (
        jnp.einsum("kts,ksh->kth", some, part.v)
        for some, part in zip(jnp.split(weights, edges, axis=-1), parts, strict=True)
    )
    return sum(read, start=jnp.zeros_like(q)).reshape(N, T, H).transpose(1, 0, 2)


def _weights(scores: Array, seen: Array, how: Scores) -> Array:
    """Softmax of scores [K, G · T, S] where a query sees the key: seen [T, S]."""
    (K, GT, S), T = scores.shape, len(seen)
    if how.softcap is not None:
        scores = how.softcap * jnp.tanh(scores / how.softcap)
    # Added, not selected: a sum has no derivative to compute, and a masked weight of 0 passes none on.
    bias = jnp.where(seen, 0.0, 0.5 * np.finfo(scores.dtype).min).astype(scores.dtype)
    scores = scores.reshape(K, GT // T, T, S) + bias[None, None]
    return jax.nn.softmax(scores, axis=-1).reshape(K, GT, S)


def query_blocks(length: int) -> list[int]:
    """Where the blocks of queries begin, and the last one ends: up to 8 blocks of at least 64."""
    blocks = max(1, min(8, length // 64))
    return [length * i // blocks for i in range(blocks + 1)]


def causal_share(length: int, kernel: Kernel) -> float:
    """Share of a row's [T, T] scores that a kernel (not "auto") computes."""
    if kernel in ("cudnn", "splash"):  # blocks above the diagonal are skipped
        blocks = max(1, length // CHUNK)
        return (blocks + 1) / (2 * blocks)
    edges = query_blocks(length) if kernel == "rows" else [0, length]
    return sum((stop - start) * stop for start, stop in pairwise(edges)) / length**2


def attend_causal_row(q: Array, k: Array, v: Array, span: Span, how: Scores = PLAIN) -> Array:
    """`attend_row` of a row on itself, in blocks of queries that stop at the last key they may see.

    Tokens of an example stand in order within a row, so no query sees a key to its right: with four blocks that saves
    three eighths of the work.
    """
    edges = query_blocks(q.shape[0])
    upto = lambda stop, start=0: Span(span.segments[start:stop], span.positions[start:stop])
    return jnp.concatenate(
        [
            attend_row(q[start:stop], k[:stop], v[:stop], upto(stop, start), upto(stop), how)
            for start, stop in pairwise(edges)
        ]
    )


def attend_in_chunks(q: Array, k: Array, v: Array, span: Span, how: Scores = PLAIN) -> Array:
    """Rows on themselves, a chunk of queries at a time: q [B, T, N, H], k and v [B, T, K, H] -> [B, T, N, H]."""
    B, T, N, H = q.shape
    chunks = -(-T // CHUNK)

    def cut(x: Array) -> Array:  # [B, T, ...] -> [chunks, B, CHUNK, ...]
        x = jnp.pad(x, ((0, 0), (0, chunks * CHUNK - T)) + ((0, 0),) * (x.ndim - 2))
        return x.reshape(B, chunks, CHUNK, *x.shape[2:]).swapaxes(0, 1)

    attend = jax.checkpoint(lambda some, at: _rows(some, k, v, at, span, how), prevent_cse=False)
    _, out = jax.lax.scan(lambda _, xs: (None, attend(*xs)), None, (cut(q), Span(*map(cut, span))))
    return out.swapaxes(0, 1).reshape(B, chunks * CHUNK, N, H)[:, :T]


def _rows(q: Array, k: Array, v: Array, query: Span, key: Span, how: Scores) -> Array:
    """`attend_row` of every row of a batch."""
    return jax.vmap(partial(attend_row, how=how))(q, k, v, query, key)


def attend_cudnn(q: Array, k: Array, v: Array, span: Span, how: Scores = PLAIN) -> Array:
    """Rows on themselves by cuDNN's fused kernel; q, k, v in half precision."""
    # A query that sees nothing would be 0 / 0.
    seen = visible(span, span, how) | jnp.eye(q.shape[1], dtype=bool)[None]
    return jax.nn.dot_product_attention(q, k, v, mask=seen[:, None], scale=how.scale, implementation="cudnn")


def choose_attention(
    platform: str,
    *,
    rows: int,
    length: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    dtype: Any,
    mesh: Any = None,
    softcap: float | None = None,
) -> tuple[Kernel, str]:
    """The kernel for rows that attend to themselves, and why.

    Args:
        platform: cpu, gpu or tpu.
        rows, length: of the batch, over all devices.
        heads, kv_heads, head_dim: N, K, H.
        dtype: of q, k and v.
        mesh: with the axes of `jaxsteer.sharding`; None for a single device.
        softcap: of the scores, see `Scores`.
    """
    plain: Kernel = "chunked" if length > CHUNK else "dense"
    if platform == "cpu":
        if mesh is None:
            return "rows", "one CPU device: scores of a few rows stay in its cache"
        return plain, "CPU devices on a mesh: XLA's own"
    if platform == "tpu":
        shards = (1, 1) if mesh is None else (mesh.shape["data"] * mesh.shape["fsdp"], mesh.shape["tensor"])
        refusal = splash_refusal(rows, length, kv_heads, *shards)
        return (plain, f"splash cannot: {refusal}") if refusal else ("splash", "TPU: fused, with segments")
    if platform == "gpu":
        if jnp.dtype(dtype).itemsize != 2:
            return plain, f"cuDNN's kernel needs half precision, not {jnp.dtype(dtype).name}"
        if softcap is not None:
            return plain, "cuDNN's kernel has no soft-cap of the scores"
        if head_dim % 8 or head_dim > 128:
            return plain, f"cuDNN's kernel needs a head_dim that 8 divides, 128 at most; got {head_dim}"
        return "cudnn", "NVIDIA: fused"
    return plain, f"no kernel of its own for {platform}"


def cached_attention(q: Array, query: Span, held: Held, new: Held, scores: Scores = PLAIN) -> Array:
    """Attention of new tokens to those in a cache and to themselves: q [B, T, N, H] -> [B, T, N, H]."""
    row = partial(attend_held_row, how=scores)
    if current_platform() == "cpu" and current_mesh() is None and q.shape[1] > 1:
        return jax.lax.map(lambda each: row(*each), (q, query, held, new), batch_size=CPU_ROWS)
    return jax.vmap(row)(q, query, held, new)


def attention(q: Array, k: Array, v: Array, query: Span, *, kernel: Kernel = "auto", scores: Scores = PLAIN) -> Array:
    """Causal grouped-query attention of rows on themselves, within segments: q [B, T, N, H], k and v [B, T, K, H].

    On one CPU the batch is mapped over a few rows at a time and rematerialised, so that scores stay in the processor's
    cache and are never stored. XLA's kernels are free of custom derivative rules: jvp, vjp and any nesting of them pass
    through.

    Raises:
        ValueError: an unknown kernel, or one that cannot take these shapes.
    """
    if kernel not in get_args(Kernel):
        raise ValueError(f"unknown attention kernel {kernel!r}: use {', '.join(get_args(Kernel))}")
    mesh, platform = current_mesh(), current_platform()
    if kernel == "auto":
        (B, T, N, H), K = q.shape, k.shape[2]
        kernel, _ = choose_attention(
            platform,
            rows=B,
            length=T,
            heads=N,
            kv_heads=K,
            head_dim=H,
            dtype=q.dtype,
            mesh=mesh,
            softcap=scores.softcap,
        )
    if kernel == "rows":
        one = jax.checkpoint(partial(attend_causal_row, how=scores))
        return jax.lax.map(lambda row: one(*row), (q, k, v, query), batch_size=CPU_ROWS)
    if kernel == "splash":
        kernel_of = lambda window: partial(
            splash_attention, softcap=scores.softcap, window=window, interpret=platform == "cpu"
        )
        operands = (scores.queries(q), k, v, query.segments)
        if isinstance(scores.local, bool):
            return kernel_of(scores.window if scores.local else None)(*operands)
        # Its mask is static: one kernel for local layers, one for the others.
        return jax.lax.cond(scores.local, kernel_of(scores.window), kernel_of(None), *operands)
    if kernel == "cudnn":
        return attend_cudnn(q, k, v, query, scores)
    if kernel == "chunked":
        return attend_in_chunks(q, k, v, query, scores)
    return _rows(q, k, v, query, query, scores)
