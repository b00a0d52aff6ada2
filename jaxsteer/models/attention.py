"""Attention behind one function: softmax(q kᵀ / √H + mask) v with grouped heads, segments, and causal by position.

Options for families that need them: another scale, soft-capped scores, a sliding window. Several kernels compute it;
`choose_attention` picks one.
"""

from __future__ import annotations

from functools import partial
from itertools import pairwise
from typing import Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, Mesh
from jax.typing import DTypeLike

from jaxsteer.models.splash import splash_attention, splash_refusal
from jaxsteer.sharding import current_mesh, current_platform
from jaxsteer.types import Array

Kernel = Literal["auto", "rows", "dense", "chunked", "cudnn", "splash"]
"""How self-attention (of rows without a cache) is computed.

auto     the kernel that `choose_attention` picks
rows     XLA, a few rows at a time in causal blocks of queries: for a single CPU device
dense    XLA, all scores at once
chunked  XLA, a chunk of queries at a time, recomputed in the backward pass: scores are never stored
cudnn    cuDNN's fused kernel (NVIDIA)
splash   the Pallas kernel (TPU)

Only the XLA kernels support forward-mode derivatives.
"""

CHUNK = 512
"""Queries that the chunked kernel computes at a time."""

CPU_ROWS = 4
"""Rows of a batch that are computed at a time on CPU, so that their scores stay in the processor's cache."""


class Span(NamedTuple):
    """Segments and positions of the queries [B, T], or of the keys [B, S].

    trunks  the segment that a query attends to besides its own, see `jaxsteer.types.Batch`; None: there are none
    """

    segments: Array
    positions: Array
    trunks: Array | None = None

    def cut(self, part: slice) -> Span:
        """Some of the queries or keys of one row."""
        return jax.tree.map(lambda field: field[part], self)


class Scores(NamedTuple):
    """How scores are computed from queries and keys.

    scale    factor on q · k; None = 1/√H
    softcap  c, if scores s become c · tanh(s / c)
    window   number of tokens that a query attends to, itself included; None = all
    local    whether the window applies in this layer, a bool or bool []
    """

    scale: float | None = None
    softcap: float | None = None
    window: int | None = None
    local: Array | bool = True

    def queries(self, q: Array) -> Array:
        """The queries, scaled so that q · k is the score."""
        return q * (q.shape[-1] ** -0.5 if self.scale is None else self.scale)


PLAIN = Scores()


def visible(query: Span, key: Span, scores: Scores = PLAIN) -> Array:
    """Which keys a query attends to, bool [..., T, S]: those of its segment and its trunk (never padding), not later
    than itself, and within the window.
    """
    same = query.segments[..., :, None] == key.segments[..., None, :]
    if query.trunks is not None:
        same |= query.trunks[..., :, None] == key.segments[..., None, :]
    distance = query.positions[..., :, None] - key.positions[..., None, :]
    seen = same & (distance >= 0) & (key.segments[..., None, :] > 0)
    if scores.window is not None:
        seen &= (distance < scores.window) | jnp.logical_not(scores.local)
    return seen


def attend_row(q: Array, k: Array, v: Array, query: Span, key: Span, rule: Scores = PLAIN) -> Array:
    """Attention of one row as plain matmuls: q [T, N, H], k and v [S, K, H] -> [T, N, H].

    Query head n uses key/value head n // (N / K). Scores and softmax are in at least fp32. A query that attends to
    nothing (padding) returns the mean of v, which is never used.
    """
    T, N, H = q.shape
    K = k.shape[1]
    q = rule.queries(q).transpose(1, 0, 2).reshape(K, N // K * T, H)  # the query heads of a group share one matmul
    scores = jnp.einsum("kth,skh->kts", q, k, preferred_element_type=np.promote_types(q.dtype, np.float32))
    weights = _weights(scores, visible(query, key, rule), rule).astype(v.dtype)
    return jnp.einsum("kts,skh->kth", weights, v).reshape(N, T, H).transpose(1, 0, 2)


class CachedKeys(NamedTuple):
    """Keys and values in the layout of a cache, k and v [B, K, S, H], with their segments and positions."""

    k: Array
    v: Array
    span: Span


def attend_cached_row(q: Array, query: Span, *parts: CachedKeys, rule: Scores = PLAIN) -> Array:
    """`attend_row` to the keys of several caches: q [T, N, H], k and v of each part [K, S, H] with its own S.

    The scores are concatenated rather than the keys and values, which are larger.
    """
    T, N, H = q.shape
    K = parts[0].k.shape[0]
    q = rule.queries(q).transpose(1, 0, 2).reshape(K, N // K * T, H)
    wide = np.promote_types(q.dtype, np.float32)
    scores = [jnp.einsum("kth,ksh->kts", q, part.k, preferred_element_type=wide) for part in parts]
    seen = jnp.concatenate([visible(query, part.span, rule) for part in parts], axis=-1)
    weights = _weights(jnp.concatenate(scores, axis=-1), seen, rule).astype(q.dtype)
    edges = np.cumsum([part.k.shape[1] for part in parts])[:-1]
    read = (
        jnp.einsum("kts,ksh->kth", some, part.v)
        for some, part in zip(jnp.split(weights, edges, axis=-1), parts, strict=True)
    )
    return sum(read, start=jnp.zeros_like(q)).reshape(N, T, H).transpose(1, 0, 2)


def _weights(scores: Array, seen: Array, rule: Scores) -> Array:
    """Softmax of scores [K, G · T, S] over the keys that a query attends to, seen [T, S]."""
    (K, GT, S), T = scores.shape, len(seen)
    if rule.softcap is not None:
        scores = rule.softcap * jnp.tanh(scores / rule.softcap)
    # Added, not selected: adding a constant is free in the backward pass, and a masked weight is 0.
    bias = jnp.where(seen, 0.0, 0.5 * np.finfo(scores.dtype).min).astype(scores.dtype)
    scores = scores.reshape(K, GT // T, T, S) + bias[None, None]
    return jax.nn.softmax(scores, axis=-1).reshape(K, GT, S)


def query_blocks(length: int) -> list[int]:
    """Boundaries of the blocks of queries: up to 8 blocks of at least 64 queries."""
    blocks = max(1, min(8, length // 64))
    return [length * i // blocks for i in range(blocks + 1)]


def causal_share(length: int, kernel: Kernel) -> float:
    """Share of a row's [T, T] scores that a kernel other than "auto" computes."""
    if kernel in ("cudnn", "splash"):  # blocks above the diagonal are skipped
        blocks = max(1, length // CHUNK)
        return (blocks + 1) / (2 * blocks)
    edges = query_blocks(length) if kernel == "rows" else [0, length]
    return sum((stop - start) * stop for start, stop in pairwise(edges)) / length**2


def attend_causal_row(q: Array, k: Array, v: Array, span: Span, rule: Scores = PLAIN) -> Array:
    """`attend_row` of a row to itself, in blocks of queries, each with the keys up to its last query.

    Tokens of an example are in order within a row, so no query attends to a key on its right: four blocks save three
    eighths of the work.
    """
    edges = query_blocks(q.shape[0])
    upto = lambda stop, start=0: span.cut(slice(start, stop))
    return jnp.concatenate(
        [
            attend_row(q[start:stop], k[:stop], v[:stop], upto(stop, start), upto(stop), rule)
            for start, stop in pairwise(edges)
        ]
    )


def attend_in_chunks(q: Array, k: Array, v: Array, span: Span, rule: Scores = PLAIN) -> Array:
    """Self-attention, a chunk of queries at a time: q [B, T, N, H], k and v [B, T, K, H] -> [B, T, N, H]."""
    B, T, N, H = q.shape
    chunks = -(-T // CHUNK)

    def cut(x: Array) -> Array:  # [B, T, ...] -> [chunks, B, CHUNK, ...]
        x = jnp.pad(x, ((0, 0), (0, chunks * CHUNK - T)) + ((0, 0),) * (x.ndim - 2))
        return x.reshape(B, chunks, CHUNK, *x.shape[2:]).swapaxes(0, 1)

    attend = jax.checkpoint(lambda some, at: _rows(some, k, v, at, span, rule), prevent_cse=False)
    _, out = jax.lax.scan(lambda _, xs: (None, attend(*xs)), None, (cut(q), jax.tree.map(cut, span)))
    return out.swapaxes(0, 1).reshape(B, chunks * CHUNK, N, H)[:, :T]


def _rows(q: Array, k: Array, v: Array, query: Span, key: Span, rule: Scores) -> Array:
    """`attend_row` of every row of a batch."""
    return jax.vmap(partial(attend_row, rule=rule))(q, k, v, query, key)


def attend_cudnn(q: Array, k: Array, v: Array, span: Span, rule: Scores = PLAIN) -> Array:
    """Self-attention with cuDNN's fused kernel; q, k, v in half precision."""
    # A query that attends to nothing would be 0 / 0.
    seen = visible(span, span, rule) | jnp.eye(q.shape[1], dtype=bool)[None]
    return jax.nn.dot_product_attention(q, k, v, mask=seen[:, None], scale=rule.scale, implementation="cudnn")


def choose_attention(
    platform: str,
    *,
    rows: int,
    length: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    dtype: DTypeLike,
    mesh: Mesh | AbstractMesh | None = None,
    softcap: float | None = None,
) -> tuple[Kernel, str]:
    """The fastest kernel for self-attention of these shapes, and the reason in words.

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
        return plain, "CPU devices on a mesh: plain XLA"
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
            return plain, f"cuDNN's kernel needs a head_dim that is a multiple of 8 and at most 128; got {head_dim}"
        return "cudnn", "NVIDIA: fused"
    return plain, f"no kernel of its own for {platform}"


def cached_attention(q: Array, query: Span, cached: CachedKeys, new: CachedKeys, scores: Scores = PLAIN) -> Array:
    """Attention of new tokens to a cache and to themselves: q [B, T, N, H] -> [B, T, N, H]."""
    row = partial(attend_cached_row, rule=scores)
    if current_platform() == "cpu" and current_mesh() is None and q.shape[1] > 1:
        return jax.lax.map(lambda args: row(*args), (q, query, cached, new), batch_size=CPU_ROWS)
    return jax.vmap(row)(q, query, cached, new)


def attend_columns(q: Array, k: Array, v: Array, query: Span, key: Span, rule: Scores = PLAIN) -> Array:
    """Attention to keys that are columns: q [B, T, N, H], k [B, K, H, S], v [B, K, S, H] -> [B, T, N, H].

    For the few queries of a decoding step, a CPU computes these products fastest.
    """
    B, T, N, H = q.shape
    K = k.shape[1]
    q = rule.queries(q).swapaxes(1, 2).reshape(B, K, N // K * T, H)
    scores = jnp.einsum("bkth,bkhs->bkts", q, k, preferred_element_type=np.promote_types(q.dtype, np.float32))
    weights = jax.vmap(partial(_weights, rule=rule))(scores, visible(query, key, rule)).astype(q.dtype)
    return jnp.einsum("bkts,bksh->bkth", weights, v).reshape(B, N, T, H).swapaxes(1, 2)


def attention(q: Array, k: Array, v: Array, query: Span, *, kernel: Kernel = "auto", scores: Scores = PLAIN) -> Array:
    """Causal grouped-query self-attention within segments: q [B, T, N, H], k and v [B, T, K, H] -> [B, T, N, H].

    On a single CPU device a few rows are computed at a time and rematerialised, so that scores stay in the processor's
    cache and are never stored. The XLA kernels have no custom derivative rules: jvp, vjp and any nesting of them work.

    Args:
        q, k, v: queries, keys and values, rotated.
        query: segments and positions of the tokens, [B, T].
        kernel: see `Kernel`.
        scores: scale, soft-cap and window.

    Raises:
        ValueError: an unknown kernel, or one that cannot compute these shapes.
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
        one = jax.checkpoint(partial(attend_causal_row, rule=scores))
        return jax.lax.map(lambda row: one(*row), (q, k, v, query), batch_size=CPU_ROWS)
    if kernel == "splash":
        if query.trunks is not None:
            raise ValueError("splash attention: cannot share prompts; lay the examples out whole")
        kernel_of = lambda window: partial(
            splash_attention, softcap=scores.softcap, window=window, interpret=platform == "cpu"
        )
        operands = (scores.queries(q), k, v, query.segments)
        if isinstance(scores.local, bool):
            return kernel_of(scores.window if scores.local else None)(*operands)
        # The mask is static: one kernel for local layers, one for the others.
        return jax.lax.cond(scores.local, kernel_of(scores.window), kernel_of(None), *operands)
    if kernel == "cudnn":
        return attend_cudnn(q, k, v, query, scores)
    if kernel == "chunked":
        return attend_in_chunks(q, k, v, query, scores)
    return _rows(q, k, v, query, query, scores)
