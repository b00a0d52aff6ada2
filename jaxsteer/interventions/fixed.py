"""Fixed steering vectors: one per layer and site."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import jax

from jaxsteer.interventions.products import vector
from jaxsteer.types import Affine, Array, Context, Directions, Intervention, Kind, ParamSpec, SiteDims


@dataclass(frozen=True)
class FixedVector(Intervention):
    """y' = y + v, the same shift for every token (the fixed vector of arXiv 2603.00425). v starts at zero."""

    kind: ClassVar[Kind] = "activation"
    writes: ClassVar[Directions] = (("v", -1),)
    per_token: ClassVar[bool] = True

    def param_specs(self, dims: SiteDims) -> dict[str, ParamSpec]:
        """The vector v, shaped like the site's output: [D], or [N, H] at `attn.heads`."""
        axes = ("width",) if len(dims.y) == 1 else ("heads", "head_dim")
        return {"v": ParamSpec(dims.y, axes, jax.nn.initializers.zeros)}

    def apply(self, p: Mapping[str, Array], x: Array, y: Array, ctx: Context) -> Array:
        """y + v."""
        return y + vector(p["v"], y.ndim, ctx)

    def affine(self, p: Mapping[str, Array]) -> Affine:
        """Δ = v."""
        return Affine(shift=p["v"])
