"""DoRA: LoRA on the direction of the weights, and a trained magnitude for each output."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp

from jaxsteer.interventions.lora import LoRA
from jaxsteer.interventions.low_rank import dropout
from jaxsteer.interventions.products import vector
from jaxsteer.types import Array, Context, Factors, ParamSpec, SiteDims


@dataclass(frozen=True)
class DoRA(LoRA):
    """y' = g ⊙ (W + s B A) x + b with g = (‖W‖ + m) / ‖W + s B A‖, norms over the weights of each output.

    Liu et al. 2024 (arXiv 2402.09353), as in PEFT: the gradient treats the norm in the denominator as a constant. m is
    the magnitude's difference from the base model's; it starts at zero, so zero parameters are the base model.
    """

    depends_on_kernel: ClassVar[bool] = True
    """Δ depends on the kernel, so `jaxsteer.steering.fold_weights` must not merge another slot into it."""

    def param_specs(self, dims: SiteDims) -> dict[str, ParamSpec]:
        """A [R, in], B [out, R] and m [out]."""
        return super().param_specs(dims) | {"m": ParamSpec(dims.y, ("out",), jax.nn.initializers.zeros)}

    def gain(self, p: Mapping[str, Array], kernel: Array) -> Array:
        """g [out]; exactly 1 if all parameters are zero. B A is never formed.

        ‖W_i + s b_i A‖² = ‖W_i‖² (1 + e_i) with e_i = [2 s b_i · (A W_i) + s² b_i · (A Aᵀ) b_i] / ‖W_i‖².
        """
        w, a, b, s = kernel.astype(p["A"].dtype), p["A"], p["B"], self.scale
        tiny = jnp.finfo(w.dtype).tiny
        before = jnp.maximum(jnp.einsum("df,df->f", w, w), tiny)
        read = jnp.einsum("rd,df->fr", a, w)
        cross = jnp.einsum("fr,fr->f", b, read)
        square = jnp.einsum("fr,rq,fq->f", b, jnp.einsum("rd,qd->rq", a, a), b)
        growth = 1 + (2 * s * cross + s**2 * square) / before
        return (1 + p["m"] / jnp.sqrt(before)) / jax.lax.stop_gradient(jnp.sqrt(jnp.maximum(growth, tiny)))

    def apply(self, p: Mapping[str, Array], x: Array, y: Array, ctx: Context) -> Array:
        """y + (g − 1) ⊙ (y − b) + g ⊙ s B A x."""
        assert ctx.kernel is not None
        gain_of = self.gain if ctx.adapter is None else jax.vmap(self.gain, ({"A": 0, "B": 1, "m": 0}, None))
        gain = gain_of(p, ctx.kernel)
        per_output = lambda gain: vector(gain.astype(y.dtype), y.ndim, ctx)
        product = y if ctx.bias is None else y - ctx.bias.astype(y.dtype).reshape((1,) * (y.ndim - 1) + ctx.bias.shape)
        shift = self.shift(p, dropout(x, self.dropout, ctx), ctx)
        return y + per_output(gain - 1) * product + per_output(gain) * shift

    def product(self, p: Mapping[str, Array], x: Array, ctx: Context) -> Array:
        """g ⊙ x (W + s (B A)ᵀ)."""
        assert ctx.kernel is not None
        y = super().product(p, x, ctx)
        return self.gain(p, ctx.kernel).reshape((1,) * (y.ndim - 1) + y.shape[-1:]) * y

    def fold(self, p: Mapping[str, Array], kernel: Array, bias: Array | None) -> tuple[Array, Array | None] | None:
        """g ⊙ (W + s (B A)ᵀ)."""
        delta = self.delta(p)
        return (self.gain(p, kernel)[None] * (kernel.astype(delta.dtype) + delta)).astype(kernel.dtype), bias

    def factors(self, p: Mapping[str, Array]) -> Factors:
        """A, B and s, with the magnitude m."""
        return super().factors(p)._replace(magnitude=p["m"])
