"""Losses: cross-entropy at the supervised positions, which alone meet the vocabulary."""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.custom_derivatives import SymbolicZero

from jaxsteer.models.transformer import Model, forward, logits_of, output_embedding
from jaxsteer.sharding import constrain, current_platform, row_shards
from jaxsteer.types import Array, Batch, PyTree, Steering

CHUNK_TOKENS, CPU_CHUNK_TOKENS = 512, 128
"""Positions whose logits exist at one time; few on a CPU, where a short matrix product is as fast as a long one."""


class Targets(NamedTuple):
    """What is predicted at each position [B, T]: the next token, and its weight in the loss (any real, 0 = nothing)."""

    tokens: Array
    weights: Array


def next_tokens(batch: Batch) -> Targets:
    """Position t predicts token t + 1 of its own example; the weight is that token's."""
    return Targets(_ahead(batch.tokens), jnp.where(_continues(batch), _ahead(batch.weights), 0.0))


def predicts_completion(batch: Batch) -> Array:
    """Whether position t predicts a completion token of its own example. bool [B, T]."""
    return _continues(batch) & _ahead(batch.completion)


def _ahead(field: Array) -> Array:
    return jnp.pad(field[:, 1:], ((0, 0), (0, 1)))


def _continues(batch: Batch) -> Array:
    """Whether the next token belongs to the same example."""
    return (_ahead(batch.segments) == batch.segments) & (batch.segments > 0)


def _nll(hidden: Array, head: Array, tokens: Array, softcap: float | None) -> Array:
    logits = logits_of(hidden, head, softcap)
    return jax.nn.logsumexp(logits, axis=-1) - jnp.take_along_axis(logits, tokens[:, None], axis=-1)[:, 0]


def _nll_and_slope(hidden: Array, head: Array, tokens: Array, softcap: float | None) -> tuple[Array, Array]:
    """The nll [M] and its gradient in `hidden` [M, D], from one set of logits z.

    Σ_v p_v head_v − head_token; soft-capped logits c tanh(z / c) weigh each head_v by their slope, 1 − (logit / c)².
    """
    logits = logits_of(hidden, head, softcap)
    highest = jax.lax.stop_gradient(jnp.max(logits, axis=-1, keepdims=True))
    unnormalised = jnp.exp(logits - highest)
    norm = jnp.sum(unnormalised, axis=-1, keepdims=True)
    target = jnp.take(head, tokens, axis=0)
    at_target = jnp.take_along_axis(logits, tokens[:, None], axis=-1)
    if softcap is not None:
        unnormalised *= 1 - jnp.square(logits / softcap)
        target = target * (1 - jnp.square(at_target / softcap)).astype(target.dtype)
    mean = jnp.einsum("mv,vd->md", unnormalised.astype(head.dtype), head, preferred_element_type=logits.dtype) / norm
    return (jnp.log(norm) + highest - at_target)[:, 0], mean - target.astype(mean.dtype)


@partial(jax.custom_jvp, nondiff_argnums=(3,))
def token_nll(hidden: Array, head: Array, tokens: Array, softcap: float | None = None) -> Array:
    """−log p(token | hidden): hidden [M, D], head [V, D], tokens int [M] -> [M], at least fp32.

    Its derivative in `hidden` is taken together with the value, while the logits are at hand: the backward pass neither
    keeps nor recomputes [M, V]. Composes with grad, jvp and their nesting.
    """
    return _nll(hidden, head, tokens, softcap)


@partial(token_nll.defjvp, symbolic_zeros=True)
def _token_nll_jvp(softcap: float | None, primals: tuple, tangents: tuple) -> tuple[Array, Array]:
    hidden, head, tokens = primals
    hidden_dot, head_dot, _ = tangents
    nll, slope = _nll_and_slope(hidden, head, tokens, softcap)
    out = jnp.zeros_like(nll)
    if type(hidden_dot) is not SymbolicZero:
        out += jnp.einsum("md,md->m", slope, hidden_dot.astype(slope.dtype))
    if type(head_dot) is not SymbolicZero:  # only when the head is trained: its logits are recomputed
        out += jax.jvp(jax.checkpoint(lambda w: _nll(hidden, w, tokens, softcap)), (head,), (head_dot,))[1]
    return nll, out


@jax.custom_batching.custom_vmap
def any_left(mask: Array) -> Array:
    """Whether anything is true; under vmap one answer for all, so that a branch on it stays a branch. bool []."""
    return jnp.any(mask)


@any_left.def_vmap
def _any_left_of_all(size: int, batched: list[bool], mask: Array) -> tuple[Array, bool]:
    return any_left(mask), False


def cross_entropy(hidden: Array, head: Array, targets: Targets, softcap: float | None = None) -> Array:
    """Σ weight · −log p(target), over the positions whose weight is not 0. Scalar, at least fp32.

    Each row's supervised positions are moved to its front; chunks of columns are then visited as long as any row has
    one left, so the unsupervised rest never meets the vocabulary, whatever share of the batch it is.

    Args:
        hidden: [B, T, D]. head: the output embedding [V, D]. targets: [B, T].
        softcap: of the logits, see `jaxsteer.models.transformer.logits_of`.
    """
    B, T, D = hidden.shape
    hidden = constrain(hidden, "rows", None, None)
    head = constrain(head, "vocab", None)  # gathered once, not for every chunk
    most = CPU_CHUNK_TOKENS if current_platform() == "cpu" else CHUNK_TOKENS  # on each device
    width = min(T, max(1, most * row_shards() // B))
    chunks = -(-T // width)
    order = jnp.argsort(targets.weights == 0, axis=1, stable=True)
    front = lambda field: jnp.pad(jnp.take_along_axis(field, order, axis=1), ((0, 0), (0, chunks * width - T))).reshape(
        B, chunks, width
    )
    tokens, weights = (front(field).swapaxes(0, 1) for field in targets)  # [chunks, B, width]
    where = front(jnp.broadcast_to(jnp.arange(T), (B, T))).swapaxes(0, 1)

    def visit(total: Array, chunk: tuple) -> tuple[Array, None]:
        where, tokens, weights = chunk

        def add() -> Array:
            h = jnp.take_along_axis(hidden, where[..., None], axis=1)
            h = jnp.where(weights[..., None] != 0, h, 0).reshape(B * width, D)  # 0 · NaN would be NaN
            return total + jnp.vdot(
                weights.reshape(-1).astype(total.dtype), token_nll(h, head, tokens.reshape(-1), softcap)
            )

        return jax.lax.cond(any_left(weights != 0), add, lambda: total), None

    zero = jnp.zeros((), np.promote_types(hidden.dtype, np.float32))
    return jax.lax.scan(visit, zero, (where, tokens, weights))[0]


def supervised_loss(
    model: Model, base: PyTree, steering: Steering, batch: Batch, key: Array | None = None, *, train: bool = False
) -> Array:
    """The summed cross-entropy of a batch's supervised tokens; divide by `total_weight` for the mean. Scalar."""
    hidden = forward(model, base, steering, batch, key=key, train=train).hidden
    return cross_entropy(hidden, output_embedding(base), next_tokens(batch), model.config.final_softcap)


def mean_loss(model: Model, base: PyTree, steering: Steering, batch: Batch) -> Array:
    """Mean cross-entropy a supervised token, nats. Scalar."""
    total = supervised_loss(model, base, steering, batch)
    return total / total_weight(batch).astype(total.dtype)


def total_weight(batch: Batch) -> Array:
    """Σ |weight| of the targets in a batch: what a summed loss is divided by. Scalar fp32. Any leading axes."""
    flat = Batch(*(field.reshape(-1, field.shape[-1]) for field in batch))
    return jnp.sum(jnp.abs(next_tokens(flat).weights))
