"""The loss of reference completions: how likely a model finds them, token by token, without generating anything."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxsteer.models.transformer import Model, forward, logits_of, output_embedding
from jaxsteer.objectives.tokens import Targets, chunk_width, fold_targets, next_tokens, scan_counted
from jaxsteer.types import Array, Batch, PyTree, Steering


class Loss(NamedTuple):
    """The loss of a set of examples.

    mean            Σ weight · −log p(token) / Σ |weight| over all supervised tokens, nats
    token_accuracy  share of the supervised tokens that are the most likely one, from 0 to 1
    tokens          number of supervised tokens
    """

    mean: float
    token_accuracy: float
    tokens: int

    @property
    def perplexity(self) -> float:
        """Exponential of the mean."""
        return math.exp(self.mean) if self.mean < 700 else math.inf


class Sums(NamedTuple):
    """What a batch adds to a `Loss`: scalars on the device."""

    loss: Array
    weight: Array
    right: Array
    tokens: Array


@partial(jax.jit, static_argnums=0)
def loss_sums(
    model: Model, base: PyTree, steering: Steering, batch: Batch, strength: Mapping[str, ArrayLike] | None = None
) -> Sums:
    """The sums of a batch [B, T] over its supervised tokens; logits are computed for these alone, in chunks.

    Args:
        model, base, steering, strength: as in `forward`.
        batch: [B, T].
    """
    hidden = forward(model, base, steering, batch, strength=strength).hidden

    def add(sums: Sums, h: Array, head: Array, targets: Targets) -> Sums:
        logits = logits_of(h, head, model.config.final_softcap)
        of_target = jnp.take_along_axis(logits, targets.tokens[:, None], axis=-1)[:, 0]
        nll, real = jax.nn.logsumexp(logits, axis=-1) - of_target, targets.weights != 0
        weights = targets.weights.astype(jnp.float32)
        return Sums(
            sums.loss + jnp.vdot(weights, nll.astype(jnp.float32)),
            sums.weight + jnp.sum(jnp.abs(weights)),
            sums.right + jnp.sum(real & (jnp.argmax(logits, axis=-1) == targets.tokens), dtype=jnp.int32),
            sums.tokens + jnp.sum(real, dtype=jnp.int32),
        )

    zero, none = jnp.zeros((), jnp.float32), jnp.zeros((), jnp.int32)
    return fold_targets(add, Sums(zero, zero, none, none), hidden, output_embedding(base), next_tokens(batch))


@partial(jax.jit, static_argnums=0)
def predicted_tokens(
    model: Model, base: PyTree, steering: Steering, batch: Batch, strength: Mapping[str, ArrayLike] | None = None
) -> Array:
    """Whether each token is the most likely one given those before it, bool [B, T]; true where none is supervised."""
    hidden, head = forward(model, base, steering, batch, strength=strength).hidden, output_embedding(base)
    B, T, D = hidden.shape
    following, row = next_tokens(batch), jnp.arange(B)[:, None]

    def visit(right: Array, index: Array, mask: Array) -> Array:
        h = jnp.take_along_axis(hidden, index[..., None], axis=1).reshape(-1, D)
        likeliest = jnp.argmax(logits_of(h, head, model.config.final_softcap), axis=-1).reshape(index.shape)
        found = likeliest == jnp.take_along_axis(following.tokens, index, axis=1)
        return right.at[row, jnp.where(mask, index + 1, T)].set(found, mode="drop")

    return scan_counted(visit, jnp.ones((B, T), bool), following.weights != 0, chunk_width(B, T))


def total_loss(batches: Iterable[Sums], what: str) -> Loss:
    """The loss of all batches together: every supervised token counts with its weight, whatever batch it is in.

    Args:
        batches: their sums, fetched from the device.
        what: the examples, for the error message.

    Raises:
        ValueError: no supervised token with a weight.
    """
    # Sums of many batches are kept in the host's double precision.
    loss, weight, right, tokens = (math.fsum(map(float, column)) for column in zip(*batches, strict=True))
    if not weight:
        raise ValueError(f"{what}: no token has a loss; each example needs a completion, with a weight that is not 0")
    return Loss(loss / weight, right / tokens, int(tokens))
