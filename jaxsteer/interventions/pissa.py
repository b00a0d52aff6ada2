"""PiSSA: LoRA initialised from the top singular vectors of the weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp

from jaxsteer.interventions.lora import LoRA
from jaxsteer.interventions.low_rank import dropout
from jaxsteer.types import Array, Context, Directions, Factors, ParamSpec, SiteDims


@dataclass(frozen=True)
class PiSSA(LoRA):
    """y' = y + s · (B A − B₀ A₀) x, where s B₀ A₀ is the best rank-R approximation of the weights (Meng et al. 2024).

    arXiv 2404.02948. The paper trains B A on top of the residual W − s B₀ A₀; here the base stays unchanged, and the
    initial factors B₀ and A₀ are kept as constants.
    """

    constants: ClassVar[tuple[str, ...]] = ("A0", "B0")
    writes: ClassVar[Directions] = (("B", -2), ("B0", -2))
    scaled: ClassVar[tuple[str, ...]] = ("B", "B0")

    def param_specs(self, dims: SiteDims) -> dict[str, ParamSpec]:
        """A, A0 [R, in] and B, B0 [out, R]; `from_kernel` gives their values."""
        specs = super().param_specs(dims)
        zeros = {name: spec._replace(init=jax.nn.initializers.zeros) for name, spec in specs.items()}
        return zeros | {f"{name}0": spec for name, spec in zeros.items()}

    def from_kernel(self, p: Mapping[str, Array], kernel: Array) -> Mapping[str, Array]:
        """B₀ = U √(S/s), A₀ = √(S/s) Vᵀ from the top R singular triples of Wᵀ = U S Vᵀ; A, B start equal to them."""
        wide = kernel.astype(p["A"].dtype)
        v, singular, ut = jnp.linalg.svd(wide, full_matrices=False)
        root = jnp.sqrt(singular[: self.rank] / self.scale)
        a = (root[None] * v[:, : self.rank]).T
        b = ut[: self.rank].T * root[None]
        return {"A": a, "B": b, "A0": a, "B0": b}

    def apply(self, p: Mapping[str, Array], x: Array, y: Array, ctx: Context) -> Array:
        """y + s · B A x − s · B₀ A₀ x."""
        x = dropout(x, self.dropout, ctx)
        return y + (self.shift(p, x, ctx) - self.shift({"A": p["A0"], "B": p["B0"]}, x, ctx))

    def delta(self, p: Mapping[str, Array]) -> Array:
        """s (B A − B₀ A₀)ᵀ, the update of one layer's kernel [in, out]."""
        return super().delta(p) - super().delta({"A": p["A0"], "B": p["B0"]})

    def factors(self, p: Mapping[str, Array]) -> Factors:
        """[A; A₀] and [B, −B₀], of twice the rank."""
        return Factors(jnp.concatenate([p["A"], p["A0"]]), jnp.concatenate([p["B"], -p["B0"]], 1), self.scale)
