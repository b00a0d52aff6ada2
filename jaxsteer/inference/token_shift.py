"""What steering does to each token of a text: how far its residual stream moves, and how its probability changes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxsteer.inference.scores import TokenScores, score_hidden
from jaxsteer.models.transformer import Model, forward
from jaxsteer.types import Array, Batch, PyTree, Steering


class TokenShift(NamedTuple):
    """The effect of steering on each token of a batch.

    shift    ‖h_steered − h‖ / ‖h‖ of the residual stream after each block, fp32 [L, B, T]; 0 at padding
    steered  log-probability of each token given those before it, and the likeliest tokens in its place
    base     the same without steering
    """

    shift: Array
    steered: TokenScores
    base: TokenScores

    @property
    def change(self) -> Array:
        """log p_steered − log p of each token, in nats, fp32 [B, T]."""
        return self.steered.log_probability - self.base.log_probability


@partial(jax.jit, static_argnames=("model", "top"))
def per_token_shift(
    model: Model,
    base: PyTree,
    steering: Steering,
    batch: Batch,
    *,
    strength: Mapping[str, ArrayLike] | None = None,
    adapters: ArrayLike | None = None,
    top: int = 0,
) -> TokenShift:
    """Compare the steered with the unsteered model on the same tokens.

    Args:
        model, base, steering: as in `forward`.
        batch: [B, T], packed, or padded on either side.
        strength: of the slots, as in `forward`.
        adapters: with stacked steering, the index of each row's or token's adapter, as in `forward`.
        top: K, the number of likeliest tokens; at most V are given.
    """
    steered = forward(model, base, steering, batch, capture=("block",), strength=strength, adapters=adapters)
    plain = forward(replace(model, plan=()), base, {}, batch, capture=("block",))
    real = batch.segments > 0
    there, here = (output.taps["block"].astype(jnp.float32) for output in (steered, plain))
    norm = lambda h: jnp.linalg.norm(h, axis=-1)
    shift = jnp.where(real[None], norm(there - here) / jnp.where(real[None], norm(here), 1.0), 0.0)
    scores = [score_hidden(model, base, output.hidden, batch, top) for output in (steered, plain)]
    return TokenShift(shift, *scores)
