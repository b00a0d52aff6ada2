"""What the methods at `attn.heads` share: the check of the site, and vectors of one layer's heads."""

from __future__ import annotations

import jax

from jaxsteer.types import Array, ParamSpec, SiteDims


def heads_and_width(dims: SiteDims, method: str) -> tuple[int, int]:
    """(N, H). ValueError at a site without heads."""
    if len(dims.y) != 2:
        raise ValueError(f"{method} steers attention heads one by one; its site is attn.heads")
    return dims.y[0], dims.y[1]


def head_vectors(dims: SiteDims, method: str) -> ParamSpec:
    """A zero vector [N, H], one for each head."""
    return ParamSpec(heads_and_width(dims, method), ("heads", "head_dim"), jax.nn.initializers.zeros)


def over_tokens(vector: Array, y: Array) -> Array:
    """vector [N, H] or [N, 1], with leading axes of size 1 up to y's rank."""
    return vector.reshape((1,) * (y.ndim - vector.ndim) + vector.shape)
