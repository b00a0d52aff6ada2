"""The tangent model: logits linear in what trains, z(θ₀) + J(θ₀)(θ − θ₀), to train in place of the full one.

Its loss is convex in θ. Trained beside the full model on the same batches, it tells lazy dynamics (features stay as
they are at θ₀) from those that move the features.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxsteer.models.transformer import Model, forward, logits_of, output_embedding
from jaxsteer.objective import next_tokens
from jaxsteer.params import Params, combine
from jaxsteer.theory.curvature import by_columns
from jaxsteer.theory.shifts import forward_mode
from jaxsteer.theory.update import complete, split_at
from jaxsteer.types import Array, Batch, PyTree, Steering


class Expansion(NamedTuple):
    """What logits are made of, at θ₀, and how it moves along θ − θ₀: hidden states [B, T, D] and head [V, D].

    head_dot is None where the head does not train.
    """

    hidden: Array
    head: Array
    hidden_dot: Array
    head_dot: Array | None


def tangent_forward(model: Model, at: Params, params: Params, batch: Batch) -> Expansion:
    """`forward` linearised: its hidden states at θ₀ and J(θ₀)(θ − θ₀), by one jvp.

    Args:
        at: the leaves of θ₀ that train, None (or nothing) in place of the others: a fresh `TrainState.params`.
        params: θ, the whole trees; what does not train is taken from here.
        batch: [B, T].

    Raises:
        ValueError: trees that do not fit, or an attention kernel without forward mode.
    """
    at = complete(at, params)
    now, still = split_at(params, at)
    plain = forward_mode(model)

    def parts(changed: Params) -> tuple[Array, Array]:
        whole = combine(changed, still)
        return forward(plain, *whole, batch).hidden, output_embedding(whole.base)

    (hidden, head), (dot, head_dot) = jax.jvp(parts, (at,), (jax.tree.map(jnp.subtract, now, at),))
    trains = output_embedding(at.base) is not None
    return Expansion(hidden, head, dot, head_dot if trains else None)


def tangent_logits(model: Model, at: Params, params: Params, batch: Batch) -> Array:
    """The linearised logits z(θ₀) + J(θ₀)(θ − θ₀), [B, T, V]; arguments as for `tangent_forward`."""
    expansion = tangent_forward(model, at, params, batch)
    return _linear_logits(expansion, expansion.hidden, expansion.hidden_dot, model.config.final_softcap)


def tangent_loss(
    model: Model,
    base: PyTree,
    steering: Steering,
    batch: Batch,
    key: Array | None = None,
    *,
    train: bool = False,
    at: Params,
) -> Array:
    """`supervised_loss` of the tangent model: Σ weight · −log softmax(z(θ₀) + J(θ₀)(θ − θ₀)). Scalar.

    A mode of training: `train_step(..., loss=partial(tangent_loss, at=at))`, everything else as ever. No gradient is
    taken in θ₀.

    Args:
        key, train: not used; what training draws at random has no part in the tangent model.
        at: as in `tangent_forward`. Others as for `supervised_loss`.
    """
    expansion = tangent_forward(model, jax.lax.stop_gradient(at), Params(base, steering), batch)

    @jax.checkpoint
    def nll(h: Array, d: Array, tokens: Array, weights: Array) -> Array:
        z = _linear_logits(expansion, h, d, model.config.final_softcap)
        picked = jnp.take_along_axis(z, tokens[..., None], axis=-1)[..., 0]
        return weights.astype(z.dtype) * (jax.nn.logsumexp(z, axis=-1) - picked)

    return jnp.sum(by_columns(nll, expansion.hidden, expansion.hidden_dot, *next_tokens(batch)))


def _linear_logits(expansion: Expansion, h: Array, d: Array, softcap: float | None) -> Array:
    """Logits of h plus their change along d (and along the head's own)."""
    if expansion.head_dot is None:
        z, dot = jax.jvp(lambda h: logits_of(h, expansion.head, softcap), (h,), (d,))
    else:
        logits = lambda h, head: logits_of(h, head, softcap)
        z, dot = jax.jvp(logits, (h, expansion.head), (d, expansion.head_dot))
    return z + dot
