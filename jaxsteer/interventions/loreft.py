"""LoReFT: an edit within a low-rank subspace with orthonormal axes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import jax

from jaxsteer.interventions.low_rank import (
    ACTIVATION_FUNCTIONS,
    LowRank,
    check_activation,
    check_rank,
    check_rate,
    dropout,
    kaiming_uniform,
    site_width,
)
from jaxsteer.interventions.products import read, vector, write_rows
from jaxsteer.types import Affine, Array, Context, Directions, Kind, ParamSpec, SiteDims

NONE = "none"


@dataclass(frozen=True)
class LoReFT(LowRank):
    """y' = y + Rᵀ (act(W y + b) − R y), with orthonormal rows of R (Wu et al. 2024, arXiv 2404.03592).

    R starts with random orthonormal rows, W and b as in a linear layer, so a freshly initialised LoReFT is not the base
    model. The optimizer keeps R orthonormal (`jaxsteer.optim.keep_orthonormal`). The paper steers positions
    `first:n+last:n`.

    rank         R
    activation   none · silu · relu · gelu (exact) · tanh, applied to W y + b
    dropout      dropout rate on Δ in training
    constrained  keep R orthonormal; False leaves it free (pyreft's NoReFT without its second bias)
    """

    kind: ClassVar[Kind] = "activation"
    reads: ClassVar[Directions] = (("W", -1), ("R", -1))
    writes: ClassVar[Directions] = (("R", -1),)
    free: ClassVar[tuple[str, ...]] = ("rank", "dropout", "constrained")
    rank: int = 8
    activation: str = NONE
    dropout: float = 0.0
    constrained: bool = True

    def __post_init__(self) -> None:
        """Reject an unknown activation and an invalid dropout rate."""
        check_activation(self.activation, (NONE, *ACTIVATION_FUNCTIONS))
        check_rate(self.dropout)

    @property
    def orthonormal(self) -> tuple[str, ...]:
        """R, if it is constrained."""
        return ("R",) if self.constrained else ()

    def param_specs(self, dims: SiteDims) -> dict[str, ParamSpec]:
        """R [R, D], W [R, D], b [R]."""
        return reft_specs(dims, self.rank, "LoReFT")

    def apply(self, p: Mapping[str, Array], x: Array, y: Array, ctx: Context) -> Array:
        """y + Rᵀ (act(W y + b) − R y)."""
        edit = learned_source(p, y, self.activation, ctx) - read(p["R"], y, ctx)
        return y + dropout(write_rows(p["R"], edit, ctx), self.dropout, ctx)

    def affine(self, p: Mapping[str, Array]) -> Affine | None:
        """Δ = Rᵀ (W − R) y + Rᵀ b, without an activation."""
        return Affine(read=p["W"] - p["R"], write=p["R"].T, shift=p["b"] @ p["R"]) if self.activation == NONE else None


def reft_specs(dims: SiteDims, rank: int, method: str) -> dict[str, ParamSpec]:
    """R [R, D] with orthonormal rows; W [R, D] and b [R] uniform in ±1/√width.

    Raises:
        ValueError: the rank does not fit, or the site has per-head vectors.
    """
    width = site_width(dims, method)
    check_rank(rank, width, width)
    return {
        "R": ParamSpec((rank, width), ("rank", "width"), jax.nn.initializers.orthogonal()),
        "W": ParamSpec((rank, width), ("rank", "width"), kaiming_uniform()),
        "b": ParamSpec((rank,), ("rank",), kaiming_uniform(fan_in=width)),
    }


def learned_source(p: Mapping[str, Array], y: Array, activation: str, ctx: Context) -> Array:
    """act(W y + b), [..., R]."""
    source = read(p["W"], y, ctx) + vector(p["b"], y.ndim, ctx)
    return source if activation == NONE else ACTIVATION_FUNCTIONS[activation](source)
