"""LoRA: a low-rank weight update, computed as an activation shift."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, Self

import jax
import jax.numpy as jnp

from jaxsteer.interventions.low_rank import LowRank, check_rank, check_rate, dropout, is_dropped, kaiming_uniform
from jaxsteer.interventions.products import read, write
from jaxsteer.interventions.updated import updated_product
from jaxsteer.types import Array, Context, Directions, Factors, Kind, ParamSpec, SiteDims


@dataclass(frozen=True)
class LoRA(LowRank):
    """y' = y + s · B A x with s = alpha / rank (Hu et al. 2021, arXiv 2106.09685). A is Kaiming uniform, B zero.

    rank     R
    alpha    numerator of the scale s
    dropout  dropout rate on x in training, as PEFT's lora_dropout
    """

    kind: ClassVar[Kind] = "weight"
    writes: ClassVar[Directions] = (("B", -2),)
    free: ClassVar[tuple[str, ...]] = ("rank", "alpha", "dropout")
    scaled: ClassVar[tuple[str, ...]] = ("B",)
    rank: int = 8
    alpha: float = 8.0
    dropout: float = 0.0

    def __post_init__(self) -> None:
        """Reject an invalid dropout rate."""
        check_rate(self.dropout)

    @property
    def scale(self) -> float:
        """The scale s of the update."""
        return self.alpha / self.rank

    def resized(self, rank: int, scale: float) -> Self:
        """The method with another rank and scale."""
        return replace(self, rank=rank, alpha=scale * rank)

    def param_specs(self, dims: SiteDims) -> dict[str, ParamSpec]:
        """A [R, in] and B [out, R]."""
        (n_in,), (n_out,) = dims
        check_rank(self.rank, n_in, n_out)
        return {
            "A": ParamSpec((self.rank, n_in), ("rank", "in"), kaiming_uniform()),
            "B": ParamSpec((n_out, self.rank), ("out", "rank"), jax.nn.initializers.zeros),
        }

    def apply(self, p: Mapping[str, Array], x: Array, y: Array, ctx: Context) -> Array:
        """y + s · B A x."""
        return y + self.shift(p, dropout(x, self.dropout, ctx), ctx)

    def project(self, p: Mapping[str, Array], x: Array, ctx: Context) -> Array | None:
        """x (W + s (B A)ᵀ) + b; None with dropout, which gives A another input than W."""
        if is_dropped(self.dropout, ctx):
            return None
        y = self.product(p, x, ctx)
        return y if ctx.bias is None else y + ctx.bias.reshape((1,) * (y.ndim - 1) + ctx.bias.shape)

    def product(self, p: Mapping[str, Array], x: Array, ctx: Context) -> Array:
        """x (W + s (B A)ᵀ)."""
        assert ctx.kernel is not None
        a, b, scale, _ = self.factors(p)
        return updated_product(x, ctx.kernel, a, scale * b)

    def shift(self, p: Mapping[str, Array], x: Array, ctx: Context) -> Array:
        """s · B A x."""
        return self.scale * write(p["B"], read(p["A"], x, ctx), ctx)

    def delta(self, p: Mapping[str, Array]) -> Array:
        """s (B A)ᵀ, the update of one layer's kernel [in, out]."""
        return self.scale * jnp.einsum("fr,rd->df", p["B"], p["A"])

    def factors(self, p: Mapping[str, Array]) -> Factors:
        """A, B and s."""
        return Factors(p["A"], p["B"], self.scale)

    def fold(self, p: Mapping[str, Array], kernel: Array, bias: Array | None) -> tuple[Array, Array | None] | None:
        """W + s (B A)ᵀ in the kernel's layout [in, out]."""
        delta = self.delta(p)
        return (kernel.astype(delta.dtype) + delta).astype(kernel.dtype), bias
