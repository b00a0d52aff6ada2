"""What the low-rank methods share: the checks on rank and width, and Kaiming's uniform initialisation."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxsteer.types import Array, Initializer, ParamSpec, SiteDims


def check_rank(rank: int, n_in: int, n_out: int) -> None:
    """Raise ValueError unless 1 <= rank <= min(n_in, n_out): more would only be the same map with more parameters."""
    if not 1 <= rank <= min(n_in, n_out):
        raise ValueError(
            f"rank {rank} does not fit a map from {n_in} to {n_out} dimensions: "
            f"it must be between 1 and {min(n_in, n_out)}"
        )


def site_width(dims: SiteDims, method: str) -> int:
    """The width of a site whose output is one vector a token. ValueError at a site of per-head vectors."""
    if len(dims.y) != 1:
        raise ValueError(f"{method} steers one vector a token; this site has {dims.y} (heads, head_dim) for each")
    return dims.y[0]


def read_write_specs(dims: SiteDims, rank: int, init_scale: float, method: str) -> dict[str, ParamSpec]:
    """D [R, D] that reads a site, uniform in ±init_scale/√width, and U [D, R] that writes to it, zero.

    Raises:
        ValueError: the rank does not fit, or the site has no one vector a token.
    """
    width = site_width(dims, method)
    check_rank(rank, width, width)
    return {
        "D": ParamSpec((rank, width), ("rank", "width"), kaiming_uniform(init_scale)),
        "U": ParamSpec((width, rank), ("width", "rank"), jax.nn.initializers.zeros),
    }


def kaiming_uniform(scale: float = 1.0) -> Initializer:
    """Uniform in ±scale/√fan_in for a matrix [fan_out, fan_in]: PyTorch's Kaiming uniform with a = √5."""

    def init(key: Array, shape: tuple[int, ...], dtype: jnp.dtype) -> Array:
        bound = scale / shape[-1] ** 0.5
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return init
