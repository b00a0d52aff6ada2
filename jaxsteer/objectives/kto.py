"""Learning from answers that are judged one by one, desirable or not: KTO."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxsteer.models.transformer import Model
from jaxsteer.objectives.objective import Mean, Objective, Summed, mean_over, policy_log_probabilities
from jaxsteer.objectives.tokens import by_segment, counted_tokens
from jaxsteer.ranges import NonNegative, Positive, check_ranges
from jaxsteer.types import Array, Batch, PyTree, Steering


class Judged(NamedTuple):
    """Judged answers, and mismatched ones, from which the reference point is estimated. [B, T] each.

    batch                 the answers, each a segment; tokens count whose weight is not 0
    desirable             fp32, +1 in desirable answers, −1 in undesirable ones, 0 elsewhere; an answer of zeros is left
                          out of loss and total
    reference             fp32, log-probability of each token that counts by the reference
    mismatched            the prompts, each with the answer to another one: rows of their own length
    mismatched_reference  fp32, the reference's log-probabilities of those
    point                 fp32, the reference point z₀, the same everywhere; `Kto.prepare` fills it in
    """

    batch: Batch
    desirable: Array
    reference: Array
    mismatched: Batch
    mismatched_reference: Array
    point: Array


def _log_ratios(policy: Array, reference: Array, batch: Batch) -> tuple[Array, Array]:
    """(log π(y|x) − log π_ref(y|x) of each segment, whether any of its tokens counts), [..., T + 1]."""
    counted = counted_tokens(batch)
    ratios = by_segment(jnp.where(counted, policy - reference.astype(policy.dtype), 0), batch)
    return ratios, by_segment(counted.astype(jnp.float32), batch) > 0


def _signs(inputs: Judged) -> Array:
    """+1 for each desirable answer, −1 for each undesirable one, 0 for no answer: fp32 [B, T + 1]."""
    return jnp.sign(by_segment(jnp.where(counted_tokens(inputs.batch), inputs.desirable, 0), inputs.batch))


@dataclass(frozen=True)
class Kto(Objective):
    """KTO (Ethayarajh et al. 2024, arXiv 2402.01306, eq. 8); its inputs are `Judged`.

    With r = log π(y|x) − log π_ref(y|x), the mean over answers of λ₊ (1 − σ(β (r − z₀))) for desirable ones and of
    λ₋ (1 − σ(β (z₀ − r))) for undesirable ones. z₀ = max(0, mean of r over the mismatched answers of the whole batch)
    has no gradient.

    beta                β
    desirable_weight    λ₊
    undesirable_weight  λ₋
    """

    beta: Positive = 0.1
    desirable_weight: NonNegative = 1.0
    undesirable_weight: NonNegative = 1.0

    def __post_init__(self) -> None:
        """Reject settings that no loss has."""
        check_ranges(self, "")

    def total(self, inputs: Judged) -> Array:
        """The number of answers."""
        return jnp.sum(jnp.abs(_signs(jax.tree.map(lambda field: field.reshape(-1, field.shape[-1]), inputs))))

    def prepare(self, model: Model, base: PyTree, steering: Steering, inputs: Judged, given: PyTree) -> Judged:
        """The inputs [M, B, T] with the reference point, from a forward pass over the mismatched answers."""

        def visit(sums: Mean, micro: tuple[Batch, Array]) -> tuple[Mean, None]:
            batch, reference = micro
            policy = policy_log_probabilities(model, base, steering, batch)
            ratios, exists = _log_ratios(policy, reference, batch)
            return jax.tree.map(jnp.add, sums, mean_over(ratios, exists)), None

        zeros = Mean(jnp.zeros((), jnp.float32), jnp.zeros((), jnp.float32))
        sums, _ = jax.lax.scan(visit, zeros, (inputs.mismatched, inputs.mismatched_reference))
        point = jnp.maximum(sums.total / jnp.maximum(sums.number, 1), 0)
        return inputs._replace(point=jnp.broadcast_to(jax.lax.stop_gradient(point), inputs.point.shape))

    def __call__(
        self,
        model: Model,
        base: PyTree,
        steering: Steering,
        inputs: Judged,
        given: PyTree,
        key: Array | None,
        *,
        train: bool,
    ) -> Summed:
        """The loss summed over the answers of a microbatch; facts are means over answers."""
        policy = policy_log_probabilities(model, base, steering, inputs.batch, key, train=train)
        ratios, _ = _log_ratios(policy, inputs.reference, inputs.batch)
        sign = _signs(inputs).astype(ratios.dtype)
        point = inputs.point[:, :1].astype(ratios.dtype)
        weight = jnp.where(sign > 0, self.desirable_weight, self.undesirable_weight).astype(ratios.dtype)
        losses = weight * jax.nn.sigmoid(-sign * self.beta * (ratios - point))
        facts = {
            "desirable_reward": mean_over(self.beta * ratios, sign > 0),
            "undesirable_reward": mean_over(self.beta * ratios, sign < 0),
            "reference_point": mean_over(jnp.broadcast_to(point, ratios.shape), sign != 0),
        }
        return Summed(jnp.sum(jnp.where(sign != 0, losses, 0)), facts)
