"""A model family as data: the features that the forward pass reads. No field here is a family's name."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from jaxsteer.types import PROJECTIONS, SITES, SiteDims


@dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies are stretched for contexts longer than those of pre-training.

    linear   all frequencies divided by `factor`
    llama3   wavelengths longer than original_length / low_factor divided by `factor`, shorter than
             original_length / high_factor kept, blended between (Llama 3.1, `rope_type: llama3`)
    """

    kind: Literal["linear", "llama3"]
    factor: float
    low_factor: float = 1.0
    high_factor: float = 4.0
    original_length: int = 8192


@dataclass(frozen=True)
class ModelConfig:
    """Dimensions and features of a decoder-only transformer.

    D = width, L = layers, N = heads, K = kv_heads, H = head_dim, F = mlp_width, V = vocab_size.
    """

    vocab_size: int
    width: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp_width: int
    norm_eps: float = 1e-5
    rope_theta: float = 10_000.0
    rope_scaling: RopeScaling | None = None
    tied_head: bool = False
    attn_bias: bool = False
    mlp_bias: bool = False
    max_length: int = 2048

    def __post_init__(self) -> None:
        """Reject shapes that no model of this architecture can have."""
        for name in ("vocab_size", "width", "layers", "heads", "kv_heads", "head_dim", "mlp_width"):
            if getattr(self, name) < 1:
                raise ValueError(f"model config: {name} must be at least 1, got {getattr(self, name)}")
        if self.heads % self.kv_heads:
            raise ValueError(
                f"model config: {self.heads} heads cannot be shared by {self.kv_heads} key/value heads; "
                "kv_heads must divide heads"
            )
        if self.head_dim % 2:
            raise ValueError(f"model config: rotary positions need an even head_dim, got {self.head_dim}")


def site_dims(config: ModelConfig, site: str) -> SiteDims:
    """Shapes of a site's x and y.

    Raises:
        ValueError: `site` is not one of SITES.
    """
    width, mlp = config.width, config.mlp_width
    heads, kv = config.heads * config.head_dim, config.kv_heads * config.head_dim
    table = {
        "attn.q": ((width,), (heads,)),
        "attn.k": ((width,), (kv,)),
        "attn.v": ((width,), (kv,)),
        "attn.o": ((heads,), (width,)),
        "mlp.gate": ((width,), (mlp,)),
        "mlp.up": ((width,), (mlp,)),
        "mlp.down": ((mlp,), (width,)),
        "attn.heads": ((width,), (config.heads, config.head_dim)),
    }
    if site not in SITES:
        raise ValueError(f"unknown site {site!r}; the sites are {', '.join(SITES)}")
    assert site in table or site not in PROJECTIONS
    return SiteDims(*table.get(site, ((width,), (width,))))
