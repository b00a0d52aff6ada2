"""Shared by the low-rank methods: their rank and scale, checks of settings, initialisers, activations, dropout."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, ClassVar, Self

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from jaxsteer.types import Array, Context, Initializer, Intervention, ParamSpec, SiteDims

ACTIVATION_FUNCTIONS: dict[str, Callable[[Array], Array]] = {
    "silu": jax.nn.silu,
    "relu": jax.nn.relu,
    "gelu": partial(jax.nn.gelu, approximate=False),  # exact (erf), as in the paper's implementation
    "tanh": jnp.tanh,
}


class LowRank(Intervention):
    """A method of rank R, to which zeros can be added, and with a factor s before some parameters."""

    per_token: ClassVar[bool] = True
    scaled: ClassVar[tuple[str, ...]] = ()
    """The parameters that the factor s stands before, wherever Δ reads them."""
    rank: int

    @property
    def scale(self) -> float:
        """The factor s."""
        return 1.0

    def resized(self, rank: int, scale: float) -> Self:
        """The method with another rank and factor s."""
        return replace(self, rank=rank)  # type: ignore[type-var]  # methods are dataclasses

    def shared(self, others: Sequence[Self]) -> Self:
        """The method at the largest rank; with a factor of 1, unless all have the same."""
        rank = max(method.rank for method in (self, *others))
        scale = self.scale if all(other.scale == self.scale for other in others) else 1.0
        return self if (rank, scale) == (self.rank, self.scale) else self.resized(rank, scale)

    def restated(self, p: Mapping[str, Array], target: Any) -> Mapping[str, Array] | None:
        """The parameters with the ratio of the factors in them; None for a lower rank or a factor of 0."""
        if target.rank < self.rank or (target.scale == 0 and self.scale != 0):
            return None
        if target.scale == self.scale:
            return p
        return {name: leaf * (self.scale / target.scale) if name in self.scaled else leaf for name, leaf in p.items()}


def check_activation(name: str, allowed: tuple[str, ...] = tuple(ACTIVATION_FUNCTIONS), hint: str = "") -> None:
    """Raise ValueError unless the activation is allowed."""
    if name not in allowed:
        raise ValueError(f"unknown activation {name!r}: use {', '.join(allowed)}{hint}")


def check_rank(rank: int, n_in: int, n_out: int) -> None:
    """Raise ValueError unless 1 <= rank <= min(n_in, n_out): a higher rank adds parameters, but no new maps."""
    if not 1 <= rank <= min(n_in, n_out):
        raise ValueError(
            f"rank {rank} does not fit a map from {n_in} to {n_out} dimensions: "
            f"it must be between 1 and {min(n_in, n_out)}"
        )


def check_rate(rate: float) -> None:
    """Raise ValueError unless a dropout rate is at least 0 and below 1."""
    if not 0 <= rate < 1:
        raise ValueError(f"dropout must be at least 0 and below 1, got {rate}")


def site_width(dims: SiteDims, method: str) -> int:
    """The width of a site whose output is one vector per token.

    Raises:
        ValueError: the site has per-head vectors.
    """
    if len(dims.y) != 1:
        raise ValueError(f"{method} steers one vector per token; this site has {dims.y} (heads, head_dim) per token")
    return dims.y[0]


def read_write_specs(dims: SiteDims, rank: int, init_scale: float, method: str) -> dict[str, ParamSpec]:
    """D [R, D] that reads a site, uniform in ±init_scale/√width, and U [D, R] that writes to it, zero.

    Raises:
        ValueError: the rank does not fit, or the site has per-head vectors.
    """
    width = site_width(dims, method)
    check_rank(rank, width, width)
    return {
        "D": ParamSpec((rank, width), ("rank", "width"), kaiming_uniform(init_scale)),
        "U": ParamSpec((width, rank), ("width", "rank"), jax.nn.initializers.zeros),
    }


def kaiming_uniform(scale: float = 1.0, fan_in: int | None = None) -> Initializer:
    """Uniform in ±scale/√fan_in, PyTorch's Kaiming uniform with a = √5; fan_in defaults to the last dimension."""

    def init(key: Array, shape: tuple[int, ...], dtype: DTypeLike) -> Array:
        bound = scale / (fan_in or shape[-1]) ** 0.5
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return init


def dropout(value: Array, rate: float, ctx: Context) -> Array:
    """value · Bernoulli(1 − rate) / (1 − rate) in training with a key; otherwise the value itself."""
    if not is_dropped(rate, ctx):
        return value
    assert ctx.key is not None
    keep = jax.random.bernoulli(ctx.key, 1 - rate, value.shape)
    return jnp.where(keep, value / (1 - rate), 0)


def is_dropped(rate: float, ctx: Context) -> bool:
    """Whether `dropout` changes anything here."""
    return rate > 0 and ctx.train and ctx.key is not None
