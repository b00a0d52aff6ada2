"""A model as data: the dimensions and features that the forward pass reads. No field is the name of a family."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from jaxsteer.types import PROJECTIONS, SITES, SiteDims


@dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies are scaled for contexts longer than those of pretraining.

    linear   all frequencies are divided by `factor`
    llama3   frequencies with a wavelength above original_length / low_factor are divided by `factor`, those below
             original_length / high_factor are kept, and those between are blended (Llama 3.1, `rope_type: llama3`)
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
    """Biases of q, k and v; attn_bias has those and one of the output."""
    qk_norm: Literal["none", "head", "whole"] = "none"
    """RMSNorm of queries and keys before rotation: of each head, or of all heads of a token together."""
    pre_norm: bool = True
    """Norm of the residual stream before attention and before the MLP."""
    post_norm: bool = False
    """Norm of the outputs of attention and of the MLP, before they are added to the residual stream."""
    norm: Literal["rms", "layer"] = "rms"
    """Kind of all norms: RMSNorm, or LayerNorm with a bias."""
    norm_plus_one: bool = False
    """RMSNorms multiply by 1 + scale."""
    gated: bool = True
    """The MLP is (act(x W_gate) ⊙ x W_up) W_down, else act(x W_up) W_down."""
    activation: Literal["silu", "gelu_tanh"] = "silu"
    """Activation function of the MLP."""
    learned_positions: bool = False
    """Add a learned vector for each of max_length positions to the embedding, and do not rotate q and k."""
    scaled_embedding: bool = False
    """Multiply the embedding by √D."""
    query_scale: float | None = None
    """Scale of the attention scores; None = 1/√H."""
    attn_softcap: float | None = None
    """Soft-cap c of the attention scores: s becomes c · tanh(s / c)."""
    final_softcap: float | None = None
    """Soft-cap of the logits."""
    window: int | None = None
    """Number of tokens that a query of a local layer attends to, itself included; None = no local layers."""
    local_layers: tuple[bool, ...] = ()
    """A flag for each layer, whether it is local; () = all are, if there is a window."""
    local_rope_theta: float | None = None
    """Rotary base of local layers, which are not scaled; None = the same as in the other layers."""
    unrotated_layers: tuple[bool, ...] = ()
    """A flag for each layer, whether it has no rotary positions; () = all have them."""

    def __post_init__(self) -> None:
        """Reject values that no model of this architecture can have."""
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
                raise ValueError(f"model config: {name} has {count} flags, the model has {self.layers} layers")
        for name in ("window", "query_scale", "attn_softcap", "final_softcap", "local_rope_theta"):
            if (value := getattr(self, name)) is not None and not value > 0:
                raise ValueError(f"model config: {name} must be above 0, got {value}")
        if self.window is None and (self.local_layers or self.local_rope_theta is not None):
            raise ValueError("model config: local layers need a window")


def check_length(config: ModelConfig, tokens: int, where: str) -> None:
    """Refuse an example that is longer than the model's learned positions; `where` names it in the message.

    Raises:
        ValueError: the model has learned positions, fewer than `tokens`.
    """
    if config.learned_positions and tokens > config.max_length:
        raise ValueError(
            f"{where}: takes up to {tokens} tokens, but this model has learned positions for {config.max_length} only; "
            "shorten the prompt, or ask for fewer new tokens"
        )


def beyond_context(config: ModelConfig, tokens: int) -> str:
    """A note on a text that is longer than the model was trained for, which rotary positions allow; "" if it is not."""
    if tokens <= config.max_length:
        return ""
    return f"{tokens:,} tokens, more than the {config.max_length:,} that the model was trained to read"


def check_new_tokens(config: ModelConfig, count: int) -> None:
    """Refuse answers longer than the model's context, before a cache of that size is allocated.

    Raises:
        ValueError: names the setting, max_new_tokens, and the length of the context.
    """
    if count > config.max_length:
        raise ValueError(
            f"max_new_tokens={count:,}: this model's context has {config.max_length:,} tokens; ask for fewer"
        )


def projections_of(config: ModelConfig) -> tuple[str, ...]:
    """The projections in a block of this model."""
    return tuple(site for site in PROJECTIONS if config.gated or site != "mlp.gate")


def site_dims(config: ModelConfig, site: str) -> SiteDims:
    """Shapes of a site's input x and output y, for one token.

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
