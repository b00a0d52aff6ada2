"""DiReFT: LoReFT without the orthonormality constraint and without the subtraction."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from jaxsteer.interventions.loreft import NONE, learned_source, reft_specs
from jaxsteer.interventions.low_rank import ACTIVATION_FUNCTIONS, LowRank, check_activation, check_rate, dropout
from jaxsteer.interventions.products import write_rows
from jaxsteer.types import Affine, Array, Context, Directions, Kind, ParamSpec, SiteDims


@dataclass(frozen=True)
class DiReFT(LowRank):
    """y' = y + R₂ᵀ act(W y + b), R₂ unconstrained (Wu et al. 2024, arXiv 2404.03592).

    R₂ starts with random orthonormal rows, so a freshly initialised DiReFT is not the base model.

    rank        R
    activation  none · silu · relu · gelu (exact) · tanh
    dropout     dropout rate on Δ in training
    """

    kind: ClassVar[Kind] = "activation"
    reads: ClassVar[Directions] = (("W", -1),)
    writes: ClassVar[Directions] = (("R", -1),)
    free: ClassVar[tuple[str, ...]] = ("rank", "dropout")
    rank: int = 8
    activation: str = NONE
    dropout: float = 0.0

    def __post_init__(self) -> None:
        """Reject an unknown activation and an invalid dropout rate."""
        check_activation(self.activation, (NONE, *ACTIVATION_FUNCTIONS))
        check_rate(self.dropout)

    def param_specs(self, dims: SiteDims) -> dict[str, ParamSpec]:
        """R [R, D], W [R, D], b [R]."""
        return reft_specs(dims, self.rank, "DiReFT")

    def apply(self, p: Mapping[str, Array], x: Array, y: Array, ctx: Context) -> Array:
        """y + R₂ᵀ act(W y + b)."""
        shift = write_rows(p["R"], learned_source(p, y, self.activation, ctx), ctx)
        return y + dropout(shift, self.dropout, ctx)

    def affine(self, p: Mapping[str, Array]) -> Affine | None:
        """Δ = R₂ᵀ W y + R₂ᵀ b, without an activation."""
        return Affine(read=p["W"], write=p["R"].T, shift=p["b"] @ p["R"]) if self.activation == NONE else None
