"""What steering does to each token of a text: how far its residual stream moves, and how its probability changes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxsteer.models.transformer import Model, forward, logits_of, output_embedding
from jaxsteer.types import Array, Batch, PyTree, Steering


class TokenShift(NamedTuple):
    """The effect of steering on each token of a batch.

    shift            ‖h_steered − h‖ / ‖h‖ of the residual stream after each block, fp32 [L, B, T]; 0 at padding
    log_probability  log p_steered − log p of each token given those before it, in nats, fp32 [B, T]; 0 at padding and
                     at the first token of an example, which nothing predicts
    """

    shift: Array
    log_probability: Array


@partial(jax.jit, static_argnames="model")
def per_token_shift(
    model: Model,
    base: PyTree,
    steering: Steering,
    batch: Batch,
    *,
    strength: Mapping[str, ArrayLike] | None = None,
) -> TokenShift:
    """Compare the steered with the unsteered model on the same tokens.

    Args:
        model, base, steering: as in `forward`.
        batch: [B, T], packed, or padded on either side.
        strength: of the slots, as in `forward`.
    """
    steered = forward(model, base, steering, batch, capture=("block",), strength=strength)
    plain = forward(replace(model, plan=()), base, {}, batch, capture=("block",))
    real = batch.segments > 0
    there, here = (output.taps["block"].astype(jnp.float32) for output in (steered, plain))
    norm = lambda h: jnp.linalg.norm(h, axis=-1)
    shift = jnp.where(real[None], norm(there - here) / jnp.where(real[None], norm(here), 1.0), 0.0)
    head, softcap = output_embedding(base), model.config.final_softcap
    change = _log_probabilities(steered.hidden, head, batch, softcap) - _log_probabilities(
        plain.hidden, head, batch, softcap
    )
    follows = real[:, 1:] & (batch.segments[:, 1:] == batch.segments[:, :-1])
    return TokenShift(shift, jnp.pad(jnp.where(follows, change, 0.0), ((0, 0), (1, 0))))


def _log_probabilities(hidden: Array, head: Array, batch: Batch, softcap: float | None) -> Array:
    """log p of every token but the first of a row, given the hidden state before it, fp32 [B, T - 1]."""

    def column(given: tuple[Array, Array]) -> Array:  # hidden [B, D], the next token [B]
        logits = logits_of(given[0], head, softcap)
        at_token = jnp.take_along_axis(logits, given[1][:, None], axis=-1)[:, 0]
        return (at_token - jax.nn.logsumexp(logits, axis=-1)).astype(jnp.float32)

    # One column at a time, for the memory of the logits.
    tokens = jnp.asarray(batch.tokens)
    return jax.lax.map(column, (hidden[:, :-1].swapaxes(0, 1), tokens[:, 1:].T)).T
