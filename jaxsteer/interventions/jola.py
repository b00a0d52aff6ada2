"""JoLA: scale and shift every head, with gates that learn which heads need it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp

from jaxsteer.interventions.heads import head_vectors, heads_and_width, over_tokens
from jaxsteer.types import Array, Context, Intervention, Kind, ParamSpec, SiteDims

TEMPERATURE = 0.33
LOW, HIGH = -0.1, 1.1
"""The hard-concrete distribution (Louizos et al. 2018, arXiv 1712.01312) is stretched to (LOW, HIGH), then clipped."""


@dataclass(frozen=True)
class JoLA(Intervention):
    """z' = z + g₂ A ⊙ z + g₁ v for every head z [H], g₁ and g₂ hard-concrete gates (Lai et al. 2025, JoLA).

    arXiv 2502.01179. A and v start at zero, the gates' logits log g at `gate_init`. The loss gains
    [λ Σ p₁ + (1 − λ) Σ p₂] / (L N), p the probability of an open gate, λ = penalty_start · e^(−penalty_decay · step).

    gate_init      log g at the start
    penalty_start  λ at step 0
    penalty_decay  how fast λ goes down, per step
    """

    kind: ClassVar[Kind] = "activation"
    gate_init: float = 0.0
    penalty_start: float = 0.1
    penalty_decay: float = 0.01

    def param_specs(self, dims: SiteDims) -> dict[str, ParamSpec]:
        """A, v [N, H]; the gates' logits log_g1 (of v), log_g2 (of A) [N]."""
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
        u1, u2 = (None, None) if ctx.key is None or not ctx.train else draw(ctx.key, p["log_g1"])
        g1, g2 = gate(p["log_g1"], u1), gate(p["log_g2"], u2)
        return y + over_tokens(g2[:, None] * p["A"], y) * y + over_tokens(g1[:, None] * p["v"], y)

    def penalty(self, p: Mapping[str, Array], step: Array) -> Array:
        """[λ Σ p₁ + (1 − λ) Σ p₂] / (L N)."""
        share = self.penalty_start * jnp.exp(-self.penalty_decay * step.astype(jnp.float32))
        open1, open2 = jnp.mean(open_probability(p["log_g1"])), jnp.mean(open_probability(p["log_g2"]))
        return (share * open1 + (1 - share) * open2).astype(jnp.float32)


def draw(key: Array, logits: Array) -> Array:
    """Uniform noise [2, N] for the gates g₁ and g₂."""
    # In the open interval: at 0 and 1 the logit would be infinite.
    return jax.random.uniform(key, (2, *logits.shape), logits.dtype, 1e-6, 1 - 1e-6)


def gate(logits: Array, u: Array | None) -> Array:
    """clip((HIGH − LOW) s + LOW, 0, 1) with s = σ((logit u + logits) / T); without noise u, s = σ(logits)."""
    s = jax.nn.sigmoid(logits) if u is None else stretched_noise(u, logits)
    return jnp.clip((HIGH - LOW) * s + LOW, 0, 1)


def stretched_noise(u: Array, logits: Array) -> Array:
    """σ((log u − log(1 − u) + logits) / T)."""
    return jax.nn.sigmoid((jnp.log(u) - jnp.log1p(-u) + logits) / TEMPERATURE)


def open_probability(logits: Array) -> Array:
    """Probability that the gate is not 0: σ(logits − T ln(−LOW / HIGH))."""
    return jax.nn.sigmoid(logits - TEMPERATURE * math.log(-LOW / HIGH))
