"""Shared by the methods at `attn.heads`: the site check, and vectors of one layer's heads."""

from __future__ import annotations

import jax

from jaxsteer.types import ParamSpec, SiteDims


def heads_and_width(dims: SiteDims, method: str) -> tuple[int, int]:
    """The number of heads N and their dimension H.

    Raises:
        ValueError: the site has no heads.
    """
    if len(dims.y) != 2:
        raise ValueError(f"{method} steers individual attention heads; its site is attn.heads")
    return dims.y[0], dims.y[1]


def head_vectors(dims: SiteDims, method: str) -> ParamSpec:
    """A vector for each head [N, H], initially zero."""
    return ParamSpec(heads_and_width(dims, method), ("heads", "head_dim"), jax.nn.initializers.zeros)
