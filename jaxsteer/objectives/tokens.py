"""Log-probabilities of a batch's tokens, computing logits only where there is a target."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.custom_derivatives import SymbolicZero

from jaxsteer.models.transformer import logits_of
from jaxsteer.sharding import constrain, current_platform, row_shards
from jaxsteer.types import Array, Batch

Carry = TypeVar("Carry")

CHUNK_TOKENS, CPU_CHUNK_TOKENS = 512, 128
"""Positions per device whose logits exist at one time. Fewer on a CPU, where a small matmul is as efficient."""


class Targets(NamedTuple):
    """What each position predicts, [B, T]: the next token, and its weight in the loss (any real; 0 = no target)."""

    tokens: Array
    weights: Array


def next_tokens(batch: Batch) -> Targets:
    """Targets of a batch: position t predicts token t + 1 of the same example, with that token's weight."""
    return Targets(_ahead(batch.tokens), jnp.where(_continues(batch), _ahead(batch.weights), 0.0))


def predicts_completion(batch: Batch) -> Array:
    """Whether position t predicts a completion token of the same example, bool [B, T]."""
    return _continues(batch) & _ahead(batch.completion)


def counted_tokens(batch: Batch) -> Array:
    """Whether a token counts: its weight is not 0, and a token of the same example precedes it. bool [..., T]."""
    before = jnp.roll(batch.segments, 1, axis=-1).at[..., 0].set(0)
    return (batch.weights != 0) & (batch.segments == before) & (batch.segments > 0)


def _ahead(field: Array) -> Array:
    return jnp.pad(field[:, 1:], ((0, 0), (0, 1)))


def _continues(batch: Batch) -> Array:
    """Whether the next token belongs to the same example."""
    return (_ahead(batch.segments) == batch.segments) & (batch.segments > 0)


def _nll(hidden: Array, head: Array, tokens: Array, softcap: float | None, temperature: float) -> Array:
    logits = logits_of(hidden, head, softcap) / temperature
    return jax.nn.logsumexp(logits, axis=-1) - jnp.take_along_axis(logits, tokens[:, None], axis=-1)[:, 0]


def _nll_and_slope(
    hidden: Array, head: Array, tokens: Array, softcap: float | None, temperature: float
) -> tuple[Array, Array]:
    """The NLL [M] and its gradient with respect to `hidden` [M, D], from one computation of the logits.

    The gradient is (Σ_v p_v head_v − head_token) / temperature. With soft-capped logits c · tanh(z / c), each head_v is
    multiplied by the cap's derivative, 1 − (logit / c)².
    """
    hot = logits_of(hidden, head, softcap)
    logits = hot / temperature
    highest = jax.lax.stop_gradient(jnp.max(logits, axis=-1, keepdims=True))
    unnormalised = jnp.exp(logits - highest)
    norm = jnp.sum(unnormalised, axis=-1, keepdims=True)
    target = jnp.take(head, tokens, axis=0)
    at_target = jnp.take_along_axis(logits, tokens[:, None], axis=-1)
    if softcap is not None:
        unnormalised *= 1 - jnp.square(hot / softcap)
        target = target * (1 - jnp.square(temperature * at_target / softcap)).astype(target.dtype)
    mean = jnp.einsum("mv,vd->md", unnormalised.astype(head.dtype), head, preferred_element_type=logits.dtype) / norm
    return (jnp.log(norm) + highest - at_target)[:, 0], (mean - target.astype(mean.dtype)) / temperature


@partial(jax.custom_jvp, nondiff_argnums=(3, 4))
def token_nll(
    hidden: Array, head: Array, tokens: Array, softcap: float | None = None, temperature: float = 1.0
) -> Array:
    """−log p(token | hidden) for each of M positions.

    The gradient with respect to `hidden` is computed in the forward pass, while the logits exist, so the backward pass
    neither stores nor recomputes [M, V]. Composes with grad, jvp and their nesting.

    Args:
        hidden: [M, D], after the final norm.
        head: output embedding [V, D].
        tokens: int [M], the targets.
        softcap: logit soft-cap, see `jaxsteer.models.transformer.logits_of`.
        temperature: what logits are divided by.

    Returns:
        [M] in nats, at least fp32.
    """
    return _nll(hidden, head, tokens, softcap, temperature)


@partial(token_nll.defjvp, symbolic_zeros=True)
def _token_nll_jvp(softcap: float | None, temperature: float, primals: tuple, tangents: tuple) -> tuple[Array, Array]:
    hidden, head, tokens = primals
    hidden_dot, head_dot, _ = tangents
    nll, slope = _nll_and_slope(hidden, head, tokens, softcap, temperature)
    out = jnp.zeros_like(nll)
    if type(hidden_dot) is not SymbolicZero:
        out += jnp.einsum("md,md->m", slope, hidden_dot.astype(slope.dtype))
    if type(head_dot) is not SymbolicZero:  # the head is trained: recompute its logits
        of_head = lambda w: _nll(hidden, w, tokens, softcap, temperature)
        out += jax.jvp(jax.checkpoint(of_head), (head,), (head_dot,))[1]
    return nll, out


@jax.custom_batching.custom_vmap
def any_left(mask: Array) -> Array:
    """Whether any entry is true, bool []. Under vmap: in any of the batch, so that a `cond` on it stays a branch."""
    return jnp.any(mask)


@any_left.def_vmap
def _any_left_of_all(size: int, batched: list[bool], mask: Array) -> tuple[Array, bool]:
    return any_left(mask), False


def scan_counted(visit: Callable[[Carry, Array, Array], Carry], carry: Carry, counted: Array, width: int) -> Carry:
    """Scan over the counted positions of each row, `width` per row at a time, and skip the rest.

    Each row's counted positions are moved to its front, in order. Chunks of columns are then visited for as long as any
    row has a counted position left, so the cost follows the fullest row and not T.

    Args:
        visit: (carry, index, mask) -> carry, for one chunk. index, int [R, width], holds positions within the rows;
            mask, bool [R, width], is true where the position is counted. The others repeat arbitrary positions.
        carry: the initial carry.
        counted: bool [R, T].
        width: columns per chunk.

    Returns:
        The final carry.
    """
    rows, length = counted.shape
    chunks = -(-length // width)
    order = jnp.argsort(~counted, axis=1, stable=True)
    into_chunks = lambda field: (
        jnp.pad(field, ((0, 0), (0, chunks * width - length))).reshape(rows, chunks, width).swapaxes(0, 1)
    )
    indices, masks = into_chunks(order), into_chunks(jnp.take_along_axis(counted, order, axis=1))

    def step(carry: Carry, chunk: tuple[Array, Array]) -> tuple[Carry, None]:
        return jax.lax.cond(any_left(chunk[1]), lambda: visit(carry, *chunk), lambda: carry), None

    return jax.lax.scan(step, carry, (indices, masks))[0]


def chunk_width(rows: int, length: int) -> int:
    """Columns of a chunk of rows [rows, length] whose logits may be in memory at one time."""
    chunk_tokens = CPU_CHUNK_TOKENS if current_platform() == "cpu" else CHUNK_TOKENS
    return min(length, max(1, chunk_tokens * row_shards() // rows))


def _joined(field: Array) -> Array:
    """[B, T, ...] with the rows of each device as one, [R, B / R · T, ...]: some rows have more targets than others."""
    parts = math.gcd(len(field), row_shards())
    return field.reshape(parts, -1, *field.shape[2:])


def fold_targets(
    add: Callable[[Carry, Array, Array, Targets], Carry], carry: Carry, hidden: Array, head: Array, targets: Targets
) -> Carry:
    """Fold a function over the positions whose weight is not 0, in chunks; no logits are computed for the others.

    Args:
        add: (carry, hidden states [n, D], head, their targets [n]) -> carry. Other positions fill a chunk up: their
            hidden states and their weights are 0.
        carry: initial value.
        hidden: [B, T, D], after the final norm.
        head: output embedding [V, D].
        targets: from `next_tokens`, [B, T].

    Returns:
        The final carry.
    """
    hidden = _joined(constrain(hidden, "rows", None, None))
    head = constrain(head, "vocab", None)  # gathered once, not for every chunk
    targets = Targets(*map(_joined, targets))
    R, T, D = hidden.shape
    width = chunk_width(R, T)

    def visit(carry: Carry, index: Array, mask: Array) -> Carry:
        h = jnp.take_along_axis(hidden, index[..., None], axis=1)
        h = jnp.where(mask[..., None], h, 0).reshape(R * width, D)  # 0 · NaN would be NaN
        tokens, weights = (jnp.take_along_axis(field, index, axis=1) for field in targets)
        return add(carry, h, head, Targets(tokens.reshape(-1), jnp.where(mask, weights, 0).reshape(-1)))

    return scan_counted(visit, carry, targets.weights != 0, width)


def total_weight(batch: Batch) -> Array:
    """Σ |weight| over the targets of a batch [..., T]: the divisor of a summed loss. Scalar fp32."""
    flat = jax.tree.map(lambda field: field.reshape(-1, field.shape[-1]), batch)
    return jnp.sum(jnp.abs(next_tokens(flat).weights))


def token_log_probabilities(
    hidden: Array, head: Array, batch: Batch, softcap: float | None = None, temperature: float = 1.0
) -> Array:
    """log p(token t | the tokens before it), at the token itself; 0 where its weight is 0.

    Args:
        hidden: [B, T, D], after the final norm.
        head: output embedding [V, D].
        batch: [B, T]; of its weights only counts where they are 0.
        softcap: logit soft-cap, see `jaxsteer.models.transformer.logits_of`.
        temperature: what logits are divided by.

    Returns:
        [B, T], natural logarithm, at least fp32. No logits are kept for the backward pass.
    """
    whole = hidden.shape[:2]
    hidden = _joined(constrain(hidden, "rows", None, None))
    head = constrain(head, "vocab", None)  # gathered once, not for every chunk
    targets = Targets(*map(_joined, next_tokens(batch)))
    R, T, D = hidden.shape
    row = jnp.arange(R)[:, None]

    def visit(found: Array, index: Array, mask: Array) -> Array:
        h = jnp.take_along_axis(hidden, index[..., None], axis=1)
        h = jnp.where(mask[..., None], h, 0).reshape(-1, D)  # 0 · NaN would be NaN
        tokens = jnp.take_along_axis(targets.tokens, index, axis=1).reshape(-1)
        nll = token_nll(h, head, tokens, softcap, temperature)
        at = jnp.where(mask, index, T)  # an index past the end is dropped
        return found.at[row, at].add(-nll.reshape(at.shape), mode="drop")

    zeros = jnp.zeros((R, T), np.promote_types(hidden.dtype, np.float32))
    found = scan_counted(visit, zeros, targets.weights != 0, chunk_width(R, T)).reshape(whole)
    return jnp.pad(found[:, :-1], ((0, 0), (1, 0)))  # from the position that predicts a token to the token


def by_segment(values: Array, batch: Batch) -> Array:
    """Sums of values [..., B, T] over each segment: [..., B, T + 1], by its number in the row (0 = padding)."""
    B, T = batch.segments.shape
    zeros = jnp.zeros((*values.shape[:-1], T + 1), values.dtype)
    return zeros.at[..., jnp.arange(B)[:, None], batch.segments].add(values)
