"""What a training step minimises: a sum over microbatches, divided by one total of the whole batch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxsteer.models.transformer import Model, forward, output_embedding
from jaxsteer.objectives.tokens import token_log_probabilities
from jaxsteer.types import Array, Batch, PyTree, Steering

Inputs = Any
"""What an objective learns from: a `Batch`, or a NamedTuple with one as its field `batch`. Rows are the first axis of
every leaf."""


class Mean(NamedTuple):
    """A fact to log, as sums that add up over microbatches: total / number."""

    total: Array
    number: Array


def mean_over(values: Array, mask: Array) -> Mean:
    """The mean of values (numbers or booleans) where a mask of their shape is true."""
    return Mean(jnp.sum(jnp.where(mask, values.astype(jnp.float32), 0)), jnp.sum(mask.astype(jnp.float32)))


class Summed(NamedTuple):
    """What an objective computes of a microbatch.

    loss   summed, scalar
    facts  what is logged besides, by name
    """

    loss: Array
    facts: dict[str, Mean]


class Objective(Protocol):
    """A loss as a pure function. Implementations are frozen (hashable) dataclasses, whose fields are the settings.

    The loss of a step is the sum of `__call__` over the microbatches, divided by `total` of the whole batch, so that
    accumulated microbatches give the gradient of one large batch. Tokens count where the weights of the batch are not
    0; advantages, signs and the like are inputs of their own.
    """

    def total(self, inputs: Inputs) -> Array:
        """The divisor of the summed loss: scalar fp32, from all microbatches, leaves [M, B, ...] or [B, ...]."""
        ...

    def prepare(self, model: Model, base: PyTree, steering: Steering, inputs: Inputs, given: PyTree) -> Inputs:
        """The inputs with what depends on the whole batch filled in, leaves [M, B, ...]. It has no gradient."""
        return inputs

    def __call__(
        self,
        model: Model,
        base: PyTree,
        steering: Steering,
        inputs: Inputs,
        given: PyTree,
        key: Array | None,
        *,
        train: bool,
    ) -> Summed:
        """The loss of one microbatch, summed.

        Args:
            model: static.
            base: base tree.
            steering: steering tree of the model's plan.
            inputs: leaves [B, ...].
            given: arrays that are the same in all steps, and not divided into microbatches: a teacher's weights. None
                for most objectives.
            key: for what draws random numbers.
            train: training mode of the methods (dropout, gates).
        """
        ...


def batch_of(inputs: Inputs) -> Batch:
    """The batch that the policy sees."""
    return inputs if isinstance(inputs, Batch) else inputs.batch


def policy_log_probabilities(
    model: Model,
    base: PyTree,
    steering: Steering,
    batch: Batch,
    key: Array | None = None,
    *,
    train: bool = False,
    strength: Mapping[str, ArrayLike] | None = None,
    temperature: float = 1.0,
) -> Array:
    """log p(token) of every token whose weight is not 0, at the token itself, by one forward pass.

    Args:
        model: static.
        base, steering, batch, key, train, strength: as in `jaxsteer.forward`.
        temperature: what logits are divided by.

    Returns:
        [B, T], at least fp32; 0 elsewhere.
    """
    hidden = forward(model, base, steering, batch, key=key, train=train, strength=strength).hidden
    return token_log_probabilities(hidden, output_embedding(base), batch, model.config.final_softcap, temperature)
