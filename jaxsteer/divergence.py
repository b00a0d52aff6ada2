"""How far steering moves a model's predictions on text: KL(base ‖ steered) at each position."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from jaxsteer.models.transformer import Model, forward, logits_of, output_embedding
from jaxsteer.objective import next_tokens
from jaxsteer.types import Array, Batch, PyTree, Steering


@partial(jax.jit, static_argnames="model")
def kl_from_base(model: Model, base: PyTree, steering: Steering, batch: Batch) -> Array:
    """Σ_v p(v) log(p(v) / q(v)), p the plain model's next-token distribution, q the steered one's.

    Args:
        batch: [B, T]; positions that predict a token of weight 0 are left out.

    Returns:
        For each row the mean over its positions, nats, fp32 [B]; 0 for a row without any.
    """
    head, softcap = output_embedding(base), model.config.final_softcap
    plain = forward(Model(model.config, attention=model.attention), base, {}, batch).hidden
    steered = forward(model, base, steering, batch).hidden

    def column(pair: tuple[Array, Array]) -> Array:  # one position's logits at a time
        p, q = (jax.nn.log_softmax(logits_of(hidden, head, softcap), axis=-1) for hidden in pair)
        return jnp.sum(jnp.exp(p) * (p - q), axis=-1)

    kl = jax.lax.map(column, (plain.swapaxes(0, 1), steered.swapaxes(0, 1))).T
    counted = (next_tokens(batch).weights > 0).astype(np.float32)
    return jnp.sum(kl.astype(np.float32) * counted, axis=1) / jnp.maximum(jnp.sum(counted, axis=1), 1.0)
