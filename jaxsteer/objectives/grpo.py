"""Learning from rewards of sampled answers, relative to the others of their group: GRPO."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np

from jaxsteer.models.transformer import Model
from jaxsteer.objectives.objective import Objective, Summed, mean_over, policy_log_probabilities
from jaxsteer.objectives.tokens import by_segment, counted_tokens
from jaxsteer.ranges import Count, Inside, NonNegative, Positive, check_ranges
from jaxsteer.types import Array, Batch, PyTree, Steering

Average = Literal["tokens", "answers", "constant"]
"""What the loss is averaged over.

tokens    all tokens of the batch's answers alike (DAPO)
answers   the tokens of each answer, then the answers (GRPO): a token of a long answer counts less
constant  the number of answers times the maximum number of tokens (Dr. GRPO): independent of the answers' lengths
"""

Scale = Literal["std", "none"]


class Rollouts(NamedTuple):
    """Sampled answers. [B, T] each.

    batch       the answers, each a segment; tokens count whose weight is not 0
    advantages  fp32, of the answer that the token belongs to
    old         fp32, log-probability of the token when it was sampled
    reference   fp32, log-probability of the token by the reference; not used where β = 0
    divisor     fp32, adds up to what the batch's loss is divided by, see `Grpo.divisor`
    """

    batch: Batch
    advantages: Array
    old: Array
    reference: Array
    divisor: Array


def group_advantages(rewards: np.ndarray, scale: Scale = "std", epsilon: float = 1e-4) -> np.ndarray:
    """A = r − mean(r), divided by std(r) + ε if scaled, within each group of answers to one prompt.

    Args:
        rewards: [Q, G].
        scale: std (GRPO) or none (Dr. GRPO).
        epsilon: keeps groups apart whose rewards are nearly equal.

    Returns:
        fp32 [Q, G]; exactly 0 where all rewards of a group are equal.

    Raises:
        ValueError: groups of one answer, whose advantage is always 0; rewards that are not finite.
    """
    rewards = np.asarray(rewards, np.float64)
    if rewards.ndim != 2 or rewards.shape[1] < 2:
        raise ValueError(f"advantages need at least 2 answers to each prompt, got rewards of shape {rewards.shape}")
    if not np.isfinite(rewards).all():
        raise ValueError("advantages: a reward is not finite")
    centred = rewards - rewards.mean(axis=1, keepdims=True)
    if scale == "std":
        centred = centred / (rewards.std(axis=1, ddof=1, keepdims=True) + epsilon)
    equal = (rewards == rewards[:, :1]).all(axis=1, keepdims=True)
    return np.where(equal, 0.0, centred).astype(np.float32)


@dataclass(frozen=True)
class Grpo(Objective):
    """GRPO (Shao et al. 2024, arXiv 2402.03300, eq. 3); its inputs are `Rollouts`.

    With ρ = π(o_t) / π_old(o_t), each token's loss is −min(ρ A, clip(ρ, 1 − ε₋, 1 + ε₊) A) + β k₃, where
    k₃ = π_ref / π − log(π_ref / π) − 1 estimates KL(π ‖ π_ref) (Schulman 2020).

    clip_low     ε₋
    clip_high    ε₊; above ε₋, unlikely tokens can grow (clip-higher, DAPO: Yu et al. 2025, arXiv 2503.14476)
    beta         β
    average      what the loss is averaged over; "constant" is Dr. GRPO's (Liu et al. 2025, arXiv 2503.20783)
    max_tokens   maximum number of tokens in an answer, for "constant"
    on_policy    the answers are those of the present parameters: π_old is π, and ρ = 1 with the gradient of ρ
    temperature  at which the answers were sampled; all policies are those at this temperature
    """

    clip_low: Inside = 0.2
    clip_high: Positive = 0.28
    beta: NonNegative = 0.0
    average: Average = "tokens"
    max_tokens: Count = 1
    on_policy: bool = True
    temperature: Positive = 1.0

    def __post_init__(self) -> None:
        """Reject settings that no loss has."""
        check_ranges(self, "")
        if self.average not in get_args(Average):
            raise ValueError(f"average {self.average!r}: use {', '.join(get_args(Average))}")

    def divisor(self, lengths: np.ndarray) -> float:
        """What the summed loss of a batch is divided by.

        Args:
            lengths: tokens of each answer of the batch, those included that are not computed because their advantage
                is 0.
        """
        if self.average == "tokens":
            return float(np.sum(lengths))
        return float(len(lengths) * (self.max_tokens if self.average == "constant" else 1))

    def total(self, inputs: Rollouts) -> Array:
        """The divisor."""
        return jnp.sum(inputs.divisor)

    def __call__(
        self,
        model: Model,
        base: PyTree,
        steering: Steering,
        inputs: Rollouts,
        given: PyTree,
        key: Array | None,
        *,
        train: bool,
    ) -> Summed:
        """The loss summed over the tokens of a microbatch; facts are means over tokens."""
        batch, counted = inputs.batch, counted_tokens(inputs.batch)
        policy = policy_log_probabilities(model, base, steering, batch, key, train=train, temperature=self.temperature)
        old = jax.lax.stop_gradient(policy) if self.on_policy else inputs.old.astype(policy.dtype)
        ratio = jnp.exp(jnp.where(counted, policy - old, 0))
        clipped = jnp.clip(ratio, 1 - self.clip_low, 1 + self.clip_high)
        advantages = inputs.advantages.astype(policy.dtype)
        gain = jnp.minimum(ratio * advantages, clipped * advantages)
        towards = jnp.where(counted, inputs.reference.astype(policy.dtype) - policy, 0)
        divergence = jnp.exp(towards) - towards - 1
        losses = -gain if self.beta == 0 else self.beta * divergence - gain
        mean = lambda values: mean_over(values, counted)
        facts = {
            "clip_share": mean(clipped * advantages < ratio * advantages),
            "ratio": mean(ratio),
            "log_probability": mean(policy),
        }
        if self.beta:
            facts["kl"] = mean(divergence)
        return Summed(jnp.sum(jnp.where(counted, losses * self._shares(batch), 0)), facts)

    def _shares(self, batch: Batch) -> Array:
        """The factor of each token's loss, [B, T]: one over its answer's length, or 1."""
        if self.average != "answers":
            return jnp.ones(batch.tokens.shape)
        lengths = by_segment(counted_tokens(batch).astype(jnp.float32), batch)
        return 1 / jnp.maximum(jnp.take_along_axis(lengths, batch.segments, axis=1), 1)
