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
    qkv_bias: bool = False
    """Biases of q, k and v alone, where attn_bias adds one to the output too."""
    qk_norm: Literal["none", "head", "whole"] = "none"
    """RMSNorm of queries and keys before they are rotated: of each head, or of all heads of a token together."""
    pre_norm: bool = True
    """Norm of the residual stream in front of attention and MLP."""
    post_norm: bool = False
    """Norm of what attention and MLP add to the residual stream."""
    norm: Literal["rms", "layer"] = "rms"
    """Every norm is an RMSNorm, or a LayerNorm with a bias."""
    norm_plus_one: bool = False
    """RMSNorms multiply by 1 + scale."""
    gated: bool = True
    """The MLP is act(x W_gate) ⊙ x W_up, or else act(x W_up), before W_down."""
    activation: Literal["silu", "gelu_tanh"] = "silu"
    """Of the MLP."""
    learned_positions: bool = False
    """A learned vector for each of max_length positions is added to the embedding; q and k are not rotated."""
    scaled_embedding: bool = False
    """Embeddings are multiplied by √D."""
    query_scale: float | None = None
    """Factor on the scores; None = 1/√H."""
    attn_softcap: float | None = None
    """Scores s become c · tanh(s / c)."""
    final_softcap: float | None = None
    """The same for logits."""
    window: int | None = None
    """Local layers attend to so many tokens, themselves included."""
    local_layers: tuple[bool, ...] = ()
    """Which layers are local, one each; () = all, if there is a window."""
    local_rope_theta: float | None = None
    """Rotary base of local layers, without scaling; None = as the others."""
    unrotated_layers: tuple[bool, ...] = ()
    """Layers without rotary positions, one each; () = none."""

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
        if self.head_dim % 2 and not self.learned_positions:
            raise ValueError(f"model config: rotary positions need an even head_dim, got {self.head_dim}")
        for name in ("local_layers", "unrotated_layers"):
            if (count := len(getattr(self, name))) not in (0, self.layers):
                raise ValueError(f"model config: {name} names {count} layers, the model has {self.layers}")
        for name in ("window", "query_scale", "attn_softcap", "final_softcap", "local_rope_theta"):
            if (value := getattr(self, name)) is not None and not value > 0:
                raise ValueError(f"model config: {name} must be above 0, got {value}")
        if self.window is None and (self.local_layers or self.local_rope_theta is not None):
            raise ValueError("model config: local layers need a window")


def check_length(config: ModelConfig, tokens: int, where: str) -> None:
    """Refuse an example that has no learned positions left.

    Raises:
        ValueError: it may take more tokens than the model has positions.
    """
    if config.learned_positions and tokens > config.max_length:
        raise ValueError(
            f"{where}: takes up to {tokens} tokens, but this model has learned positions for {config.max_length} only; "
            "shorten the prompt, or ask for fewer new tokens"
        )


def projections_of(config: ModelConfig) -> tuple[str, ...]:
    """The projections that a block of this model has."""
    return tuple(site for site in PROJECTIONS if config.gated or site != "mlp.gate")


def site_dims(config: ModelConfig, site: str) -> SiteDims:
    """Shapes of a site's x and y.

    Raises:
        ValueError: `site` is not one of SITES, or the model does not have it.
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
    if site in PROJECTIONS and site not in projections_of(config):
        raise ValueError(f"this model has no {site!r}; its projections are {', '.join(projections_of(config))}")
    assert site in table or site not in PROJECTIONS
    return SiteDims(*table.get(site, ((width,), (width,))))
