"""Linear low-rank steering."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, Self

from jaxsteer.interventions.low_rank import LowRank, read_write_specs
from jaxsteer.interventions.products import read, write
from jaxsteer.types import Affine, Array, Context, Directions, Kind, ParamSpec, SiteDims


@dataclass(frozen=True)
class LinearSteering(LowRank):
    """y' = y + α · U D y, the linear variant of the steering in arXiv 2603.00425. D starts small, U at zero.

    rank        R
    alpha       α, scales the shift
    init_scale  D is initialised uniformly in ±init_scale/√width
    """

    kind: ClassVar[Kind] = "activation"
    reads: ClassVar[Directions] = (("D", -1),)
    writes: ClassVar[Directions] = (("U", -2),)
    free: ClassVar[tuple[str, ...]] = ("rank", "alpha", "init_scale")
    scaled: ClassVar[tuple[str, ...]] = ("U",)
    rank: int = 8
    alpha: float = 1.0
    init_scale: float = 1e-3

    @property
    def scale(self) -> float:
        """α."""
        return self.alpha

    def resized(self, rank: int, scale: float) -> Self:
        """The method with another rank and α."""
        return replace(self, rank=rank, alpha=scale)

    def param_specs(self, dims: SiteDims) -> dict[str, ParamSpec]:
        """D [R, D] reads, U [D, R] writes."""
        return read_write_specs(dims, self.rank, self.init_scale, "linear steering")

    def apply(self, p: Mapping[str, Array], x: Array, y: Array, ctx: Context) -> Array:
        """y + α · U D y."""
        return y + self.alpha * write(p["U"], read(p["D"], y, ctx), ctx)

    def affine(self, p: Mapping[str, Array]) -> Affine:
        """Δ = α · U D y."""
        return Affine(read=p["D"], write=self.alpha * p["U"])
