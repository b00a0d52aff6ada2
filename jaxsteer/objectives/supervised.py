"""Cross-entropy over a batch's supervised tokens: the objective of supervised fine-tuning."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from jaxsteer.models.transformer import Model, forward, output_embedding
from jaxsteer.objectives.objective import Objective, Summed
from jaxsteer.objectives.tokens import Targets, fold_targets, next_tokens, token_nll, total_weight
from jaxsteer.types import Array, Batch, PyTree, Steering


def cross_entropy(hidden: Array, head: Array, targets: Targets, softcap: float | None = None) -> Array:
    """Σ weight · −log p(target) over the positions whose weight is not 0; no logits are computed for the others.

    Args:
        hidden: [B, T, D], after the final norm.
        head: output embedding [V, D].
        targets: from `next_tokens`, [B, T].
        softcap: logit soft-cap, see `jaxsteer.models.transformer.logits_of`.

    Returns:
        Scalar in nats, at least fp32.
    """

    def add(total: Array, h: Array, head: Array, targets: Targets) -> Array:
        return total + jnp.vdot(targets.weights.astype(total.dtype), token_nll(h, head, targets.tokens, softcap))

    zero = jnp.zeros((), np.promote_types(hidden.dtype, np.float32))
    return fold_targets(add, zero, hidden, head, targets)


def supervised_loss(
    model: Model,
    base: PyTree,
    steering: Steering,
    batch: Batch,
    key: Array | None = None,
    *,
    train: bool = False,
    strength: Mapping[str, ArrayLike] | None = None,
) -> Array:
    """Sum of weight · cross-entropy over a batch's supervised tokens; divide by `total_weight` for the mean.

    Args:
        model: static.
        base: base tree.
        steering: steering tree of the model's plan.
        batch: [B, T].
        key: for methods that draw random numbers while training.
        train: training mode of the methods (dropout, gates).
        strength: of the slots, as in `forward`.

    Returns:
        Scalar in nats, at least fp32.
    """
    hidden = forward(model, base, steering, batch, key=key, train=train, strength=strength).hidden
    return cross_entropy(hidden, output_embedding(base), next_tokens(batch), model.config.final_softcap)


def mean_loss(
    model: Model,
    base: PyTree,
    steering: Steering,
    batch: Batch,
    *,
    strength: Mapping[str, ArrayLike] | None = None,
) -> Array:
    """Mean cross-entropy per supervised token of a batch [B, T], a scalar in nats; `strength` as in `forward`."""
    total = supervised_loss(model, base, steering, batch, strength=strength)
    return total / total_weight(batch).astype(total.dtype)


class LossFunction(Protocol):
    """A loss summed over a batch's supervised tokens, such as `supervised_loss`."""

    def __call__(
        self, model: Model, base: PyTree, steering: Steering, batch: Batch, key: Array | None, /, *, train: bool
    ) -> Array:
        """The scalar loss of a batch [B, T]."""
        ...


@dataclass(frozen=True)
class Supervised(Objective):
    """L = Σ weight · −log p(token) / Σ |weight|, over the supervised tokens; its inputs are a `Batch`.

    loss  the sum, of a microbatch
    """

    loss: LossFunction = supervised_loss

    def total(self, inputs: Batch) -> Array:
        """Σ |weight|."""
        return total_weight(inputs)

    def __call__(
        self,
        model: Model,
        base: PyTree,
        steering: Steering,
        inputs: Batch,
        given: PyTree,
        key: Array | None,
        *,
        train: bool,
    ) -> Summed:
        """The weighted sum of the cross-entropy."""
        return Summed(self.loss(model, base, steering, inputs, key, train=train), {})


SUPERVISED = Supervised()
