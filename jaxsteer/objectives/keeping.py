"""Learning from examples while predictions on neutral text stay what they were."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import jax.numpy as jnp

from jaxsteer.models.transformer import Model, Network, forward, output_embedding
from jaxsteer.objectives.distillation import Predictions, Taught, counted_kl, predictions
from jaxsteer.objectives.objective import Mean, Objective, Summed
from jaxsteer.objectives.supervised import SUPERVISED
from jaxsteer.objectives.tokens import counted_tokens
from jaxsteer.ranges import Positive, check_ranges
from jaxsteer.types import Array, Batch, PyTree, Steering


class Kept(NamedTuple):
    """Examples to learn, with texts to leave alone.

    batch    the examples, [B, T]
    neutral  the texts, [B, T']; tokens count whose weight is not 0
    """

    batch: Batch
    neutral: Batch


@dataclass(frozen=True)
class Keeping(Objective):
    """L + λ KL(before ‖ after), the mean over the tokens of neutral text; its inputs are `Kept`.

    It is given the model before, a `Network` over the same vocabulary. The KL is that of the next token's distribution.

    objective  L, whose inputs are a `Batch`
    weight     λ
    """

    objective: Objective = SUPERVISED
    weight: Positive = 1.0

    def __post_init__(self) -> None:
        """Reject a weight that asks for nothing, or for a change."""
        check_ranges(self, "")

    def total(self, inputs: Kept) -> Array:
        """That of the objective."""
        return self.objective.total(inputs.batch)

    def prepare(self, model: Model, base: PyTree, steering: Steering, inputs: Kept, given: Network) -> Kept:
        """Weights for the texts with which the summed KL, divided by `total`, is λ times its mean over all."""
        batch = self.objective.prepare(model, base, steering, inputs.batch, None)
        counted = counted_tokens(inputs.neutral)
        number = jnp.sum(counted.astype(jnp.float32))
        share = self.weight * self.total(inputs).astype(jnp.float32) / jnp.maximum(number, 1)
        return Kept(batch, inputs.neutral._replace(weights=jnp.where(counted, share, 0)))

    def __call__(
        self,
        model: Model,
        base: PyTree,
        steering: Steering,
        inputs: Kept,
        given: Network,
        key: Array | None,
        *,
        train: bool,
    ) -> Summed:
        """The loss of a microbatch, with the weighted sum of the KL over its texts."""
        learned = self.objective(model, base, steering, inputs.batch, None, key, train=train)
        hidden = forward(model, base, steering, inputs.neutral, key=key, train=train).hidden
        after = Predictions(hidden, output_embedding(base), model.config.final_softcap)
        kl = counted_kl(after, Taught(inputs.neutral, inputs.neutral), predictions(given, inputs.neutral))
        fact = Mean(jnp.sum(kl), jnp.sum(counted_tokens(inputs.neutral).astype(jnp.float32)))
        weighted = jnp.vdot(inputs.neutral.weights.astype(kl.dtype), kl)
        return Summed(learned.loss + weighted.astype(learned.loss.dtype), learned.facts | {"neutral_kl": fact})
