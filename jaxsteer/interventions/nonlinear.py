"""Nonlinear low-rank steering: the post-block adapter of arXiv 2603.00425."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, Self

from jaxsteer.interventions.low_rank import ACTIVATION_FUNCTIONS, LowRank, check_activation, read_write_specs
from jaxsteer.interventions.products import read, write
from jaxsteer.types import Array, Context, Directions, Kind, ParamSpec, SiteDims


@dataclass(frozen=True)
class NonlinearSteering(LowRank):
    """y' = y + α · U act(D y), the paper's method at site `block`. D starts small, U at zero.

    rank        R
    alpha       α, scales the shift
    activation  silu · relu · gelu (exact) · tanh
    init_scale  D is initialised uniformly in ±init_scale/√width
    """

    kind: ClassVar[Kind] = "activation"
    reads: ClassVar[Directions] = (("D", -1),)
    writes: ClassVar[Directions] = (("U", -2),)
    free: ClassVar[tuple[str, ...]] = ("rank", "alpha", "init_scale")
    scaled: ClassVar[tuple[str, ...]] = ("U",)
    rank: int = 8
    alpha: float = 1.0
    activation: str = "silu"
    init_scale: float = 1e-3

    def __post_init__(self) -> None:
        """Reject an unknown activation."""
        check_activation(self.activation, hint=" (or method `linear`)")

    @property
    def scale(self) -> float:
        """α."""
        return self.alpha

    def resized(self, rank: int, scale: float) -> Self:
        """The method with another rank and α."""
        return replace(self, rank=rank, alpha=scale)

    def param_specs(self, dims: SiteDims) -> dict[str, ParamSpec]:
        """D [R, D] reads, U [D, R] writes."""
        return read_write_specs(dims, self.rank, self.init_scale, "nonlinear steering")

    def apply(self, p: Mapping[str, Array], x: Array, y: Array, ctx: Context) -> Array:
        """y + α · U act(D y)."""
        hidden = ACTIVATION_FUNCTIONS[self.activation](read(p["D"], y, ctx))
        return y + self.alpha * write(p["U"], hidden, ctx)
