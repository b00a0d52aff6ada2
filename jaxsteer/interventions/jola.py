"""JoLA: scale and shift every attention head, with gates that learn which heads to steer."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp

from jaxsteer.interventions.heads import head_vectors, heads_and_width
from jaxsteer.interventions.products import vector
from jaxsteer.types import Affine, Array, Context, Intervention, Kind, ParamSpec, SiteDims

TEMPERATURE = 0.33
LOW, HIGH = -0.1, 1.1
"""The hard-concrete distribution (Louizos et al. 2018, arXiv 1712.01312): stretched to (LOW, HIGH), then clipped."""


@dataclass(frozen=True)
class JoLA(Intervention):
    """z' = z + g₂ A ⊙ z + g₁ v for every head z [H], with hard-concrete gates g₁ and g₂ (Lai et al. 2025).

    arXiv 2502.01179. A and v start at zero, the gates' logits log g at `gate_init`. The penalty is
    [λ Σ p₁ + (1 − λ) Σ p₂] / (L N), where p is the probability that a gate is open and
    λ = penalty_start · e^(−penalty_decay · step).

    gate_init      initial log g
    penalty_start  λ at step 0
    penalty_decay  exponential decay rate of λ, per step
    """

    kind: ClassVar[Kind] = "activation"
    per_token: ClassVar[bool] = True
    free: ClassVar[tuple[str, ...]] = ("gate_init", "penalty_start", "penalty_decay")
    gate_init: float = 0.0
    penalty_start: float = 0.1
    penalty_decay: float = 0.01

    def param_specs(self, dims: SiteDims) -> dict[str, ParamSpec]:
        """A, v [N, H]; the gates' logits log_g1 (for v), log_g2 (for A) [N]."""
        heads, _ = heads_and_width(dims, "JoLA")
        gate = ParamSpec((heads,), ("heads",), jax.nn.initializers.constant(self.gate_init))
        return {
            "A": head_vectors(dims, "JoLA"),
            "v": head_vectors(dims, "JoLA"),
            "log_g1": gate,
            "log_g2": gate,
        }

    def apply(self, p: Mapping[str, Array], x: Array, y: Array, ctx: Context) -> Array:
        """z + g₂ A ⊙ z + g₁ v."""
        u1, u2 = (None, None) if ctx.key is None or not ctx.train else uniform_noise(ctx.key, p["log_g1"])
        g1, g2 = gate(p["log_g1"], u1), gate(p["log_g2"], u2)
        scale, shift = g2[..., None] * p["A"], g1[..., None] * p["v"]
        return y + vector(scale, y.ndim, ctx) * y + vector(shift, y.ndim, ctx)

    def affine(self, p: Mapping[str, Array]) -> Affine:
        """Δ = g₂ A ⊙ z + g₁ v, with the gates of evaluation."""
        g1, g2 = gate(p["log_g1"], None), gate(p["log_g2"], None)
        return Affine(scale=g2[:, None] * p["A"], shift=g1[:, None] * p["v"])

    def penalty(self, p: Mapping[str, Array], step: Array) -> Array:
        """[λ Σ p₁ + (1 − λ) Σ p₂] / (L N)."""
        weight = self.penalty_start * jnp.exp(-self.penalty_decay * step.astype(jnp.float32))
        open1, open2 = jnp.mean(open_probability(p["log_g1"])), jnp.mean(open_probability(p["log_g2"]))
        return (weight * open1 + (1 - weight) * open2).astype(jnp.float32)


def uniform_noise(key: Array, logits: Array) -> Array:
    """Uniform noise [2, N] for the gates g₁ and g₂."""
    # Bounded away from 0 and 1, where the logit is infinite.
    return jax.random.uniform(key, (2, *logits.shape), logits.dtype, 1e-6, 1 - 1e-6)


def gate(logits: Array, u: Array | None) -> Array:
    """clip((HIGH − LOW) s + LOW, 0, 1) with s = σ((logit u + logits) / T), or s = σ(logits) without noise u."""
    s = jax.nn.sigmoid(logits) if u is None else concrete_sample(u, logits)
    return jnp.clip((HIGH - LOW) * s + LOW, 0, 1)


def concrete_sample(u: Array, logits: Array) -> Array:
    """A sample of the binary concrete distribution from uniform noise u: σ((log u − log(1 − u) + logits) / T)."""
    return jax.nn.sigmoid((jnp.log(u) - jnp.log1p(-u) + logits) / TEMPERATURE)


def open_probability(logits: Array) -> Array:
    """Probability that a gate is not 0: σ(logits − T ln(−LOW / HIGH))."""
    return jax.nn.sigmoid(logits - TEMPERATURE * math.log(-LOW / HIGH))
