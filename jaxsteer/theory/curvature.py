"""Curvature of the loss in the steering: Gauss–Newton, Fisher and Hessian products, and per-example gradients.

With z the logits at the supervised positions, w their weights, W = Σ w, p = softmax z and J = ∂z/∂steering:

    Gauss–Newton      G v = Jᵀ H J v / W,  H = w (diag p − p pᵀ), the Hessian of the loss in z
    empirical Fisher  F v = Σ_t w_t g_t (g_tᵀ v) / W,  g_t the gradient of −log p of the target token

For this loss G is the Fisher information of the model's predictions: what F becomes when tokens are sampled from p.
No product forms a matrix, or the logits of more than a few hundred positions at a time.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

from jaxsteer.models.transformer import Model, forward, logits_of, output_embedding
from jaxsteer.objectives.supervised import mean_loss, supervised_loss
from jaxsteer.objectives.tokens import CHUNK_TOKENS, next_tokens, token_nll, total_weight
from jaxsteer.theory.shifts import forward_mode
from jaxsteer.types import Array, Batch, PyTree, Steering

LARGEST = 4096
"""Default maximum number of parameters for which `dense` forms a matrix: 64 MB in fp32."""


def gauss_newton_product(model: Model, base: PyTree, steering: Steering, batch: Batch, vector: Steering) -> Steering:
    """G v: the Gauss–Newton matrix of the mean loss at `steering`, which is its Fisher information, times a vector.

    Args:
        model: static.
        base: weights.
        steering: where the matrix is taken.
        batch: [B, T].
        vector: v, a tree like `steering`.

    Returns:
        A tree like `steering`.

    Raises:
        ValueError: an attention kernel without forward mode.
    """
    targets, head, softcap = next_tokens(batch), output_embedding(base), model.config.final_softcap
    hidden, dot, pull = _both_ways(model, base, steering, batch, vector)

    def product(h: Array, d: Array, weights: Array) -> Array:
        logits = lambda h: logits_of(h, head, softcap)
        z, pull_logits = jax.vjp(logits, h)
        d = jax.jvp(logits, (h,), (d,))[1]
        p = jax.nn.softmax(z, axis=-1)
        centred = d - jnp.sum(p * d, axis=-1, keepdims=True)
        return pull_logits(weights[..., None].astype(z.dtype) * p * centred)[0]

    cotangent = by_columns(product, hidden, dot, targets.weights)
    return _divided(pull(cotangent.astype(hidden.dtype)), batch)


def empirical_fisher_product(
    model: Model, base: PyTree, steering: Steering, batch: Batch, vector: Steering
) -> Steering:
    """F v: the second moment of the per-token gradients at `steering`, times a vector. As `gauss_newton_product`."""
    targets, head, softcap = next_tokens(batch), output_embedding(base), model.config.final_softcap
    hidden, dot, pull = _both_ways(model, base, steering, batch, vector)

    def product(h: Array, d: Array, tokens: Array, weights: Array) -> Array:
        flat = lambda h: token_nll(h.reshape(-1, h.shape[-1]), head, tokens.reshape(-1), softcap)
        nll, pull_nll = jax.vjp(flat, h)
        d = jax.jvp(flat, (h,), (d,))[1]
        return pull_nll(weights.reshape(-1).astype(nll.dtype) * d)[0]

    cotangent = by_columns(product, hidden, dot, targets.tokens, targets.weights)
    return _divided(pull(cotangent.astype(hidden.dtype)), batch)


def hessian_product(model: Model, base: PyTree, steering: Steering, batch: Batch, vector: Steering) -> Steering:
    """The Hessian of the mean loss at `steering` times a vector, forward over reverse. As `gauss_newton_product`."""
    gradient = jax.grad(lambda s: mean_loss(forward_mode(model), base, s, batch))
    return jax.jvp(gradient, (steering,), (vector,))[1]


def dense(product: Callable[[PyTree], PyTree], tree: PyTree, largest: int = LARGEST) -> Array:
    """The matrix [P, P] of a linear map between trees of one structure, computed column by column.

    Args:
        product: the map, e.g. `lambda v: gauss_newton_product(model, base, steering, batch, v)`.
        tree: an example of its argument, with P numbers.
        largest: maximum P.

    Returns:
        Rows and columns are in the order of `jax.flatten_util.ravel_pytree(tree)`.

    Raises:
        ValueError: P is larger than `largest`.
    """
    flat, unravel = ravel_pytree(tree)
    if flat.size > largest:
        raise ValueError(
            f"a matrix over {flat.size:,} parameters would have {flat.size**2:,} entries; the maximum is "
            f"{largest:,} parameters. Steer fewer layers, steer with fixed vectors, or raise largest="
        )
    column = lambda unit: ravel_pytree(product(unravel(unit)))[0]
    return jax.lax.map(column, jnp.eye(flat.size, dtype=flat.dtype)).T


def per_example_gradients(
    model: Model, base: PyTree, steering: Steering, batch: Batch, examples: int | None = None
) -> Steering:
    """The gradient in `steering` of each example's Σ weight · nll, by vmap over rows and the examples in them.

    Args:
        model: static.
        base: weights.
        steering: where the gradients are taken.
        batch: [B, T], packed or padded.
        examples: E, the maximum number of examples in a row; default: counted, if the batch is not traced.

    Returns:
        Leaves [B, E, ...]; zeros where a row has fewer. They add up to the gradient of `supervised_loss`.

    Raises:
        ValueError: a row holds more examples (checked where the batch is not traced), or E is missing under jit.
    """
    if not isinstance(batch.segments, jax.core.Tracer):
        highest = int(np.max(np.asarray(batch.segments), initial=1))
        examples = highest if examples is None else examples
        if examples < highest:
            raise ValueError(f"examples={examples}: a row of this batch holds {highest}")
    if examples is None:
        raise ValueError("under jit, give the maximum number of examples in a row: examples=n")

    def gradient(row: Batch, number: Array) -> Steering:
        one = row._replace(weights=jnp.where(row.segments == number, row.weights, 0))
        single = jax.tree.map(lambda field: field[None], one)
        return jax.grad(supervised_loss, argnums=2)(model, base, steering, single)

    numbers = jnp.arange(1, examples + 1, dtype=batch.segments.dtype)
    return jax.vmap(jax.vmap(gradient, (None, 0)), (0, None))(batch, numbers)


def by_columns(f: Callable[..., Array], *fields: Array) -> Array:
    """Map f over chunks of columns of [B, T, ...] arrays and concatenate the results; rows stay on their devices."""
    B, T = fields[0].shape[:2]
    width = min(T, max(1, CHUNK_TOKENS // B))
    chunks = -(-T // width)

    def cut(x: Array) -> Array:
        x = jnp.pad(x, ((0, 0), (0, chunks * width - T)) + ((0, 0),) * (x.ndim - 2))
        return x.reshape(B, chunks, width, *x.shape[2:]).swapaxes(0, 1)

    out = jax.lax.map(lambda chunk: f(*chunk), tuple(map(cut, fields)))
    return out.swapaxes(0, 1).reshape(B, chunks * width, *out.shape[3:])[:, :T]


def _both_ways(
    model: Model, base: PyTree, steering: Steering, batch: Batch, vector: Steering
) -> tuple[Array, Array, Callable]:
    """The hidden states, their jvp along the vector, and their vjp as a function."""
    model = forward_mode(replace(model, train_base=False))
    f = lambda s: forward(model, base, s, batch).hidden
    vector = jax.tree.map(lambda v, s: jnp.asarray(v).astype(s.dtype), vector, steering)
    hidden, pull = jax.vjp(f, steering)
    return hidden, jax.jvp(f, (steering,), (vector,))[1], lambda cotangent: pull(cotangent)[0]


def _divided(tree: PyTree, batch: Batch) -> PyTree:
    total = total_weight(batch)
    return jax.tree.map(lambda leaf: leaf / total.astype(leaf.dtype), tree)
