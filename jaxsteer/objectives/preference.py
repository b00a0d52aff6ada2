"""Learning from pairs of a chosen and a rejected answer: DPO, IPO, SimPO and BiPO.

Δ = [log π(y₊|x) − log π_ref(y₊|x)] − [log π(y₋|x) − log π_ref(y₋|x)], the margin, is what the losses are functions of.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp

from jaxsteer.models.transformer import Model
from jaxsteer.objectives.objective import Objective, Summed, mean_over, policy_log_probabilities
from jaxsteer.objectives.tokens import counted_tokens
from jaxsteer.ranges import Finite, Positive, Range, check_ranges
from jaxsteer.types import Array, Batch, PyTree, Steering

PairLoss = Literal["sigmoid", "ipo", "simpo"]


class Pairs(NamedTuple):
    """Pairs of answers; both of a pair are in one row. [B, T] each.

    batch      the answers, each a segment; tokens count whose weight is not 0. A pair with an answer in which none
               counts is left out of loss and total
    pair       int32, the number of the token's pair in its row, from 1; 0 = none
    sign       fp32, +1 in a chosen answer, −1 in a rejected one, 0 elsewhere
    reference  fp32, log-probability of each token that counts by the reference
    """

    batch: Batch
    pair: Array
    sign: Array
    reference: Array


class _PairSums(NamedTuple):
    """Sums over the answers of each pair, [B, T + 1]; 0 where there is no pair of this number.

    policy, reference  log π and log π_ref, of both answers: [2, B, T + 1], the chosen one first
    lengths            tokens that count, fp32 [2, B, T + 1]
    exists             whether there is a pair of this number, bool [B, T + 1]
    """

    policy: Array
    reference: Array
    lengths: Array
    exists: Array


def _over_answers(values: Array, inputs: Pairs) -> Array:
    """Sums of values [B, T] over the tokens of each pair that count: [2, B, T + 1], the chosen answers first."""
    counted = counted_tokens(inputs.batch) & (inputs.pair > 0)
    rows = jnp.arange(counted.shape[0])[:, None]
    zeros = jnp.zeros((counted.shape[0], counted.shape[1] + 1), values.dtype)
    side = lambda own: zeros.at[rows, inputs.pair].add(jnp.where(counted & own, values, 0))
    return jnp.stack([side(inputs.sign > 0), side(inputs.sign < 0)])


def _by_pair(inputs: Pairs, policy: Array) -> _PairSums:
    """Sum a [B, T] array of log-probabilities, and the reference's, over the answers of each pair."""
    lengths = _over_answers(jnp.ones_like(policy), inputs)
    reference = _over_answers(inputs.reference.astype(policy.dtype), inputs)
    return _PairSums(_over_answers(policy, inputs), reference, lengths, jnp.all(lengths > 0, axis=0))


@dataclass(frozen=True)
class Preference(Objective):
    """The mean over pairs of a loss of the margin Δ; its inputs are `Pairs`.

    sigmoid  −(1 − ε) log σ(βΔ) − ε log σ(−βΔ): DPO (Rafailov et al. 2023, arXiv 2305.18290, eq. 7); ε > 0 is
             conservative DPO
    ipo      (Δ − 1 / (2β))², IPO (Azar et al. 2023, arXiv 2310.12036, eq. 17)
    simpo    −log σ(β (log π(y₊)/|y₊| − log π(y₋)/|y₋|) − γ), SimPO (Meng et al. 2024, arXiv 2405.14734, eq. 6); the
             reference is not used

    loss             which of them
    beta             β
    label_smoothing  ε of sigmoid
    margin           γ of simpo
    bidirectional    of sigmoid: draw d = ±1 for each microbatch, scale the plan's shifts by d, and use d Δ, so that the
                     steering works in both directions (BiPO, Cao et al. 2024, arXiv 2406.00045, eq. 2)
    """

    loss: PairLoss = "sigmoid"
    beta: Positive = 0.1
    label_smoothing: Annotated[float, Range(0, 0.5, open_high=True)] = 0.0
    margin: Finite = 0.0
    bidirectional: bool = False

    def __post_init__(self) -> None:
        """Reject settings that no loss has."""
        if self.loss not in get_args(PairLoss):
            raise ValueError(f"preference loss {self.loss!r}: use {', '.join(get_args(PairLoss))}")
        check_ranges(self, "")
        for name, owner in (("label_smoothing", "sigmoid"), ("bidirectional", "sigmoid"), ("margin", "simpo")):
            if getattr(self, name) and self.loss != owner:
                raise ValueError(f"{name} is a setting of the {owner} loss, not of {self.loss}")

    def total(self, inputs: Pairs) -> Array:
        """The number of pairs."""
        flat = jax.tree.map(lambda field: field.reshape(-1, field.shape[-1]), inputs)
        lengths = _over_answers(jnp.ones(flat.pair.shape, jnp.float32), flat)
        return jnp.sum(jnp.all(lengths > 0, axis=0).astype(jnp.float32))

    def __call__(
        self,
        model: Model,
        base: PyTree,
        steering: Steering,
        inputs: Pairs,
        given: PyTree,
        key: Array | None,
        *,
        train: bool,
    ) -> Summed:
        """The loss summed over the pairs of a microbatch; facts are means over pairs."""
        direction, strength = jnp.ones(()), None
        if self.bidirectional and train:
            assert key is not None
            key, own = jax.random.split(key)
            direction = jax.random.rademacher(own, (), jnp.float32)
            strength = {slot.name: direction for slot in model.plan}
        policy = policy_log_probabilities(model, base, steering, inputs.batch, key, train=train, strength=strength)
        sums = _by_pair(inputs, policy)
        losses, margins = self.of_pairs(sums, direction.astype(policy.dtype))
        return _summed(losses, margins, sums)

    def of_pairs(self, sums: _PairSums, direction: Array) -> tuple[Array, Array]:
        """The loss and the (scaled) margin of each pair, [B, T + 1]."""
        if self.loss == "simpo":
            chosen, rejected = sums.policy / jnp.maximum(sums.lengths, 1)
            margins = self.beta * (chosen - rejected)
            return -jax.nn.log_sigmoid(margins - self.margin), margins
        chosen, rejected = sums.policy - sums.reference
        margins = self.beta * (chosen - rejected)
        if self.loss == "ipo":
            return jnp.square(chosen - rejected - 1 / (2 * self.beta)), margins
        directed = direction * margins
        smooth = self.label_smoothing
        losses = -(1 - smooth) * jax.nn.log_sigmoid(directed) - smooth * jax.nn.log_sigmoid(-directed)
        return losses, directed


def _summed(losses: Array, margins: Array, sums: _PairSums) -> Summed:
    """The sum over the pairs that exist."""
    mask = sums.exists
    over = lambda values: mean_over(values, mask)
    facts = {
        "pair_accuracy": over(margins > 0),
        "margin": over(margins),
        "chosen_log_probability": over(sums.policy[0]),
        "rejected_log_probability": over(sums.policy[1]),
    }
    return Summed(jnp.sum(jnp.where(mask, losses, 0)), facts)
