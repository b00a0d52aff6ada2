"""LoRA: a low-rank weight update, computed as the activation shift that it is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp

from jaxsteer.interventions.low_rank import check_rank, kaiming_uniform
from jaxsteer.types import Array, Context, Intervention, Kind, ParamSpec, SiteDims


@dataclass(frozen=True)
class LoRA(Intervention):
    """y' = y + s · B A x with s = alpha / rank (Hu et al. 2021). A is Kaiming uniform, B starts at zero."""

    kind: ClassVar[Kind] = "weight"
    rank: int = 8
    alpha: float = 8.0

    @property
    def scale(self) -> float:
        """The factor s on the update."""
        return self.alpha / self.rank

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
        read = jnp.einsum("...d,rd->...r", x, p["A"])
        return y + self.scale * jnp.einsum("...r,fr->...f", read, p["B"])

    def fold(self, p: Mapping[str, Array], kernel: Array, bias: Array | None) -> tuple[Array, Array | None] | None:
        """W + s (B A)ᵀ in the kernel's layout [in, out]."""
        delta = self.scale * jnp.einsum("fr,rd->df", p["B"], p["A"])
        return (kernel.astype(delta.dtype) + delta).astype(kernel.dtype), bias
