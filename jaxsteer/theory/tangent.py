"""The tangent model: logits linear in the trained parameters, z(θ₀) + J(θ₀)(θ − θ₀).

Its loss is convex in θ. Trained beside the full model on the same batches, it tells lazy dynamics, in which features
stay as they are at θ₀, from those that learn features.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxsteer.models.transformer import Model, forward, logits_of, output_embedding
from jaxsteer.objectives.tokens import next_tokens
from jaxsteer.params import Params, combine
from jaxsteer.theory.curvature import by_columns
from jaxsteer.theory.shifts import forward_mode
from jaxsteer.theory.update import complete, split_at
from jaxsteer.types import Array, Batch, PyTree, Steering


class Expansion(NamedTuple):
    """Hidden states and head at θ₀, and their derivatives along θ − θ₀.

    hidden      [B, T, D]
    head        [V, D]
    hidden_dot  [B, T, D]
    head_dot    [V, D]; None where the head is not trained
    """

    hidden: Array
    head: Array
    hidden_dot: Array
    head_dot: Array | None


def tangent_forward(model: Model, at: Params, params: Params, batch: Batch) -> Expansion:
    """`forward` linearised at θ₀: its hidden states and J(θ₀)(θ − θ₀), by one jvp.

    Args:
        model: static.
        at: the trained leaves of θ₀, None (or nothing) in place of the others, as in a fresh `TrainState.params`.
        params: θ, the whole trees; frozen leaves are taken from here.
        batch: [B, T].

    Raises:
        ValueError: trees that do not fit, or an attention kernel without forward mode.
    """
    at = complete(at, params)
    now, frozen = split_at(params, at)
    model = forward_mode(model)

    def hidden_and_head(trained: Params) -> tuple[Array, Array]:
        whole = combine(trained, frozen)
        return forward(model, *whole, batch).hidden, output_embedding(whole.base)

    (hidden, head), (hidden_dot, head_dot) = jax.jvp(hidden_and_head, (at,), (jax.tree.map(jnp.subtract, now, at),))
    head_is_trained = output_embedding(at.base) is not None
    return Expansion(hidden, head, hidden_dot, head_dot if head_is_trained else None)


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

    Takes the place of `supervised_loss` in training: `train_step(objective=Supervised(partial(tangent_loss, at=at)))`.
    θ₀ has no gradient.

    Args:
        model, base, steering, batch: as for `supervised_loss`.
        key, train: ignored; the tangent model has no dropout or other randomness.
        at: as for `tangent_forward`.
    """
    expansion = tangent_forward(model, jax.lax.stop_gradient(at), Params(base, steering), batch)

    @jax.checkpoint
    def nll(h: Array, d: Array, tokens: Array, weights: Array) -> Array:
        z = _linear_logits(expansion, h, d, model.config.final_softcap)
        picked = jnp.take_along_axis(z, tokens[..., None], axis=-1)[..., 0]
        return weights.astype(z.dtype) * (jax.nn.logsumexp(z, axis=-1) - picked)

    return jnp.sum(by_columns(nll, expansion.hidden, expansion.hidden_dot, *next_tokens(batch)))


def _linear_logits(expansion: Expansion, h: Array, d: Array, softcap: float | None) -> Array:
    """Logits of the hidden states h plus their change along d and along the head's derivative."""
    if expansion.head_dot is None:
        z, dot = jax.jvp(lambda h: logits_of(h, expansion.head, softcap), (h,), (d,))
    else:
        logits = lambda h, head: logits_of(h, head, softcap)
        z, dot = jax.jvp(logits, (h, expansion.head), (d, expansion.head_dot))
    return z + dot
