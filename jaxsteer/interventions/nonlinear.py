"""Nonlinear low-rank steering: the paper's post-block adapter."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import jax
import jax.numpy as jnp

from jaxsteer.interventions.low_rank import read_write_specs
from jaxsteer.types import Array, Context, Intervention, Kind, ParamSpec, SiteDims

ACTIVATION_FUNCTIONS: dict[str, Callable[[Array], Array]] = {
    "silu": jax.nn.silu,
    "relu": jax.nn.relu,
    "gelu": partial(jax.nn.gelu, approximate=False),  # the exact one (erf), as in the paper's implementation
    "tanh": jnp.tanh,
}


@dataclass(frozen=True)
class Nonlinear(Intervention):
    """y' = y + α · U act(D y), arXiv 2603.00425 at site `block`. D starts small, U at zero.

    rank        R
    alpha       α, a factor on the shift
    activation  silu · relu · gelu (exact) · tanh
    init_scale  D is uniform in ±init_scale/√width
    """

    kind: ClassVar[Kind] = "activation"
    rank: int = 8
    alpha: float = 1.0
    activation: str = "silu"
    init_scale: float = 1e-3

    def __post_init__(self) -> None:
        """Reject an unknown activation."""
        if self.activation not in ACTIVATION_FUNCTIONS:
            raise ValueError(
                f"unknown activation {self.activation!r}: use {', '.join(ACTIVATION_FUNCTIONS)} (or method `linear`)"
            )

    def param_specs(self, dims: SiteDims) -> dict[str, ParamSpec]:
        """D [R, D] reads, U [D, R] writes."""
        return read_write_specs(dims, self.rank, self.init_scale, "nonlinear steering")

    def apply(self, p: Mapping[str, Array], x: Array, y: Array, ctx: Context) -> Array:
        """y + α · U act(D y)."""
        read = ACTIVATION_FUNCTIONS[self.activation](jnp.einsum("...d,rd->...r", y, p["D"]))
        return y + self.alpha * jnp.einsum("...r,dr->...d", read, p["U"])
