"""The parts of a block, each a Flax Linen module over one layer's parameters: norm, rotary, attention, MLP, block.

Every projection and sublayer hands its input and output to `steer(site, x, y, kernel, bias)`, which returns the y to go
on with. That call is the whole of what a model knows about interventions.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple, Protocol

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from jaxsteer.models.attention import Kernel, Span, attention
from jaxsteer.models.config import ModelConfig
from jaxsteer.types import Array, Cache


class Steer(Protocol):
    """What happens at a site: (site, x, y, kernel and bias of a projection) -> y'."""

    def __call__(self, site: str, x: Array, y: Array, kernel: Array | None = None, bias: Array | None = None) -> Array:
        """The site's y, steered."""
        ...


class LayerCache(NamedTuple):
    """The cache of all layers, and the layer whose part is read and written.

    It rides whole in the scan's carry, so that writing is in place. Where the tokens to be written stand is in
    `cache.segments` and `cache.positions` already.
    """

    cache: Cache
    layer: Array

    def write(self, k: Array, v: Array) -> LayerCache:
        """Put new keys and values [B, T, K, H] at the first free slots."""
        at = (self.layer, 0, self.cache.used, 0, 0)
        put = lambda stack, new: jax.lax.dynamic_update_slice(stack, new[None].astype(stack.dtype), at)
        return self._replace(cache=self.cache._replace(k=put(self.cache.k, k), v=put(self.cache.v, v)))

    def read(self, dtype: Any) -> tuple[Array, Array]:
        """All keys and values of the layer, two [B, S, K, H]."""
        get = lambda stack: jax.lax.dynamic_index_in_dim(stack, self.layer, keepdims=False).astype(dtype)
        return get(self.cache.k), get(self.cache.v)


class Inputs(NamedTuple):
    """What the blocks share besides the residual stream: sin, cos [B, T, H/2] and the tokens' places."""

    sin: Array
    cos: Array
    span: Span


def at_least_fp32(x: Array) -> Array:
    """x in fp32, or in fp64 if it is in fp64."""
    return x.astype(np.promote_types(x.dtype, np.float32))


def over_last_axis(vector: Array, ndim: int) -> Array:
    """vector [D] as [1, ..., 1, D] of rank `ndim`: implicit rank promotion is an error in this project's tests."""
    return vector.reshape((1,) * (ndim - 1) + vector.shape)


def rotary_frequencies(config: ModelConfig) -> Array:
    """Angular frequency of each pair of rotary dimensions, radians a token, fp32 [H/2].

    θ^(−2i/H), stretched as `config.rope_scaling` says (Llama 3.1: transformers' `rope_type: llama3`).
    """
    half = jnp.arange(0, config.head_dim, 2, dtype=jnp.float32) / config.head_dim
    frequencies = 1.0 / (config.rope_theta**half)
    scaling = config.rope_scaling
    if scaling is None:
        return frequencies
    if scaling.kind == "linear":
        return frequencies / scaling.factor
    turns = scaling.original_length * frequencies / (2 * math.pi)  # within the original context
    keep = (turns - scaling.low_factor) / (scaling.high_factor - scaling.low_factor)
    keep = jnp.clip(keep, 0.0, 1.0)
    return keep * frequencies + (1 - keep) * frequencies / scaling.factor


def rotary_angles(config: ModelConfig, positions: Array) -> tuple[Array, Array]:
    """(sin, cos) of position × frequency: positions [B, T] -> two fp32 [B, T, H/2]."""
    angles = jnp.einsum("bt,h->bth", positions.astype(jnp.float32), rotary_frequencies(config))
    return jnp.sin(angles), jnp.cos(angles)


def rotate(x: Array, sin: Array, cos: Array) -> Array:
    """Rotate the pairs (i, i + H/2) of each head by its token's angles: x [B, T, N, H] -> the same.

    Source: RoFormer (Su et al. 2021), in the half-split layout of GPT-NeoX and Llama's HF weights.
    """
    a, b = jnp.split(at_least_fp32(x), 2, axis=-1)
    sin, cos = sin[:, :, None].astype(a.dtype), cos[:, :, None].astype(a.dtype)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)


class RMSNorm(nn.Module):
    """x / rms(x) · scale over the last axis, the statistic in at least fp32 (Zhang & Sennrich 2019)."""

    eps: float

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """X [..., D] -> [..., D], in x's dtype."""
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],))
        wide = at_least_fp32(x)
        wide = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + self.eps)
        return (wide * over_last_axis(scale.astype(wide.dtype), wide.ndim)).astype(x.dtype)


class Projection(nn.Module):
    """y = x W (+ b), then whatever is steered at `site`."""

    features: int
    bias: bool
    site: str

    @nn.compact
    def __call__(self, x: Array, steer: Steer) -> Array:
        """X [B, T, in] -> [B, T, features]."""
        kernel = self.param("kernel", nn.initializers.lecun_normal(), (x.shape[-1], self.features))
        y = jnp.einsum("btd,df->btf", x, kernel)
        bias = self.param("bias", nn.initializers.zeros, (self.features,)) if self.bias else None
        if bias is not None:
            y = y + over_last_axis(bias, y.ndim)
        # Named, so that rematerialisation can keep these products and recompute only what is cheap.
        return steer(self.site, x, checkpoint_name(y, self.site), kernel, bias)


class Attention(nn.Module):
    """Causal self-attention with rotary positions and grouped key/value heads."""

    config: ModelConfig
    kernel: Kernel = "auto"

    @nn.compact
    def __call__(
        self, x: Array, inputs: Inputs, cache: LayerCache | None, steer: Steer
    ) -> tuple[Array, LayerCache | None]:
        """x [B, T, D], normalised -> the attention's contribution to the residual stream, and the cache written to."""
        c = self.config
        B, T, _ = x.shape

        def project(name: str, heads: int) -> Array:
            y = Projection(heads * c.head_dim, c.attn_bias, f"attn.{name}", name=name)(x, steer)
            return y.reshape(B, T, heads, c.head_dim)

        q = rotate(project("q", c.heads), inputs.sin, inputs.cos)
        k = rotate(project("k", c.kv_heads), inputs.sin, inputs.cos)
        v = project("v", c.kv_heads)
        if cache is None:
            heads = attention(q, k, v, inputs.span, kernel=self.kernel)
        else:
            cache = cache.write(k, v)
            heads = attention(q, *cache.read(x.dtype), inputs.span, Span(cache.cache.segments, cache.cache.positions))
        heads = steer("attn.heads", x, heads)
        y = Projection(c.width, c.attn_bias, "attn.o", name="o")(heads.reshape(B, T, -1), steer)
        return steer("attn", x, y), cache


class MLP(nn.Module):
    """Gated MLP, (silu(x W_gate) ⊙ x W_up) W_down (Shazeer 2020)."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x: Array, steer: Steer) -> Array:
        """x [B, T, D], normalised -> the MLP's contribution to the residual stream."""
        c = self.config
        gate = Projection(c.mlp_width, c.mlp_bias, "mlp.gate", name="gate")(x, steer)
        up = Projection(c.mlp_width, c.mlp_bias, "mlp.up", name="up")(x, steer)
        y = Projection(c.width, c.mlp_bias, "mlp.down", name="down")(nn.silu(gate) * up, steer)
        return steer("mlp", x, y)


class Block(nn.Module):
    """One transformer block: h + attention(norm h), then + MLP(norm ·)."""

    config: ModelConfig
    kernel: Kernel = "auto"

    @nn.compact
    def __call__(
        self, h: Array, inputs: Inputs, cache: LayerCache | None, steer: Steer
    ) -> tuple[Array, LayerCache | None]:
        """h [B, T, D], the residual stream -> the stream after the block, and the cache written to."""
        c = self.config
        y, cache = Attention(c, self.kernel, name="attn")(
            RMSNorm(c.norm_eps, name="attn_norm")(h), inputs, cache, steer
        )
        middle = checkpoint_name(h + y, "residual")
        x = steer("mlp.in", middle, RMSNorm(c.norm_eps, name="mlp_norm")(middle))
        out = checkpoint_name(middle + MLP(c, name="mlp")(x, steer), "residual")
        return steer("block", h, out), cache


class Embed(nn.Module):
    """Token embedding, E[tokens]."""

    config: ModelConfig

    @nn.compact
    def __call__(self, tokens: Array) -> Array:
        """Tokens [B, T] -> [B, T, D]."""
        shape = (self.config.vocab_size, self.config.width)
        embedding = self.param("embedding", nn.initializers.normal(0.02), shape)
        return jnp.take(embedding, tokens, axis=0)
