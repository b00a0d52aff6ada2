"""The parts of a block, each a Flax Linen module over one layer's parameters: norms, attention, MLP; and embeddings.

Every projection and sublayer passes its input and output to `steer` (`jaxsteer.models.sites`) and continues with the y
that it returns. That call is all a model knows about interventions.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple, Protocol

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from jaxsteer.matmul import matmul
from jaxsteer.models.attention import CachedKeys, Kernel, Scores, Span, attend_columns, attention, cached_attention
from jaxsteer.models.config import ModelConfig
from jaxsteer.models.quantise import dequantised
from jaxsteer.models.sites import Steer
from jaxsteer.types import Array, Cache


class KeysValues(NamedTuple):
    """Keys and values of a layer in the layout of a cache, [B, K, T, H] each."""

    k: Array
    v: Array


class LayerCache(Protocol):
    """The cache of one layer, as its attention uses it."""

    def attend(self, q: Array, new: CachedKeys, scores: Scores) -> tuple[Array, KeysValues]:
        """Attention of new tokens, q [B, T, N, H], to the cache and to themselves: heads [B, T, N, H], and what the
        block returns for the cache."""
        ...


class StackedCache(NamedTuple):
    """A layer of a cache whose layers are stacked; the block returns its new keys and values.

    Layers only read it: if they wrote to it inside the scan, XLA would copy the whole stack for every layer.
    """

    cache: Cache
    layer: Array

    def attend(self, q: Array, new: CachedKeys, scores: Scores) -> tuple[Array, KeysValues]:
        """See `LayerCache`."""
        get = lambda stack: jax.lax.dynamic_index_in_dim(stack, self.layer, keepdims=False).astype(q.dtype)
        cached = CachedKeys(get(self.cache.k), get(self.cache.v), Span(self.cache.segments, self.cache.positions))
        return cached_attention(q, new.span, cached, new, scores), KeysValues(new.k, new.v)


class OwnCache(NamedTuple):
    """A layer's own arrays, to which new keys and values are written in place; the block returns the arrays.

    k, v   what was cached, [B, K, H, S] and [B, K, S, H]
    span   segments and positions of its entries, the new ones included
    start  int32 [], the entry of the first new token
    """

    k: Array
    v: Array
    span: Span
    start: Array

    def attend(self, q: Array, new: CachedKeys, scores: Scores) -> tuple[Array, KeysValues]:
        """See `LayerCache`."""
        write = lambda old, new, *at: jax.lax.dynamic_update_slice(old, new.astype(old.dtype), (0, 0, *at))
        k, v = write(self.k, new.k.swapaxes(2, 3), 0, self.start), write(self.v, new.v, self.start, 0)
        heads = attend_columns(q, k.astype(q.dtype), v.astype(q.dtype), new.span, self.span, scores)
        return heads, KeysValues(k, v)


class Inputs(NamedTuple):
    """What a block reads besides the residual stream.

    sin, cos  of the rotary angles, [B, T, H/2]; None without rotary positions
    span      segments and positions of the tokens
    local     whether the layer attends within the window, a bool or bool []
    """

    sin: Array | None
    cos: Array | None
    span: Span
    local: Array | bool = True


def at_least_fp32(x: Array) -> Array:
    """x in fp32, or in fp64 if it is in fp64."""
    return x.astype(np.promote_types(x.dtype, np.float32))


def over_last_axis(vector: Array, ndim: int) -> Array:
    """vector [D] as [1, ..., 1, D] of rank `ndim`: implicit rank promotion is an error in this project's tests."""
    return vector.reshape((1,) * (ndim - 1) + vector.shape)


def rotary_frequencies(config: ModelConfig, *, local: bool = False) -> Array:
    """Angular frequency of each pair of rotary dimensions, in radians per token: θ^(−2i/H), fp32 [H/2].

    Scaled as `config.rope_scaling` says (as in transformers' `rope_type: llama3` for Llama 3.1); local layers with a θ
    of their own are not scaled.
    """
    half = jnp.arange(0, config.head_dim, 2, dtype=jnp.float32) / config.head_dim
    local_theta = config.local_rope_theta if local else None
    frequencies = 1.0 / ((local_theta or config.rope_theta) ** half)
    scaling = config.rope_scaling
    if scaling is None or local_theta is not None:
        return frequencies
    if scaling.kind == "linear":
        return frequencies / scaling.factor
    turns = scaling.original_length * frequencies / (2 * math.pi)  # within the original context
    keep = (turns - scaling.low_factor) / (scaling.high_factor - scaling.low_factor)
    keep = jnp.clip(keep, 0.0, 1.0)
    return keep * frequencies + (1 - keep) * frequencies / scaling.factor


def rotary_angles(config: ModelConfig, positions: Array, *, local: bool = False) -> tuple[Array, Array]:
    """(sin, cos) of position × frequency: positions [B, T] -> two fp32 [B, T, H/2]."""
    angles = jnp.einsum("bt,h->bth", positions.astype(jnp.float32), rotary_frequencies(config, local=local))
    return jnp.sin(angles), jnp.cos(angles)


def layer_inputs(config: ModelConfig, span: Span) -> Callable[[Array], Inputs]:
    """Layer index -> what its block reads besides the residual stream; what layers share is computed once, here."""
    if config.learned_positions:
        return lambda layer: Inputs(None, None, span, local=config.window is not None)
    angles = rotary_angles(config, span.positions)
    local_angles = angles if config.local_rope_theta is None else rotary_angles(config, span.positions, local=True)

    def inputs(layer: Array) -> Inputs:
        flag = lambda layers: jnp.array(layers)[layer]
        local = flag(config.local_layers) if config.local_layers else config.window is not None
        sin, cos = angles
        if config.local_rope_theta is not None:
            sin, cos = (jnp.where(local, a, b) for a, b in zip(local_angles, angles, strict=True))
        if config.unrotated_layers:
            unrotated = flag(config.unrotated_layers)
            sin, cos = jnp.where(unrotated, 0.0, sin), jnp.where(unrotated, 1.0, cos)
        return Inputs(sin, cos, span, local)

    return inputs


def rotate(x: Array, sin: Array | None, cos: Array | None) -> Array:
    """Rotate the pairs (i, i + H/2) of each head of x [B, T, N, H] by its token's angles; without angles, return x.

    Source: RoFormer (Su et al. 2021), in the half-split layout of GPT-NeoX and of Llama's Hugging Face weights.
    """
    if sin is None or cos is None:
        return x
    a, b = jnp.split(at_least_fp32(x), 2, axis=-1)
    sin, cos = sin[:, :, None].astype(a.dtype), cos[:, :, None].astype(a.dtype)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)


class RMSNorm(nn.Module):
    """x / rms(x) · scale over the last axis, the statistic in at least fp32 (Zhang & Sennrich 2019).

    With plus_one the factor is 1 + scale (Gemma).
    """

    eps: float
    plus_one: bool = False

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """X [..., D] -> [..., D], in x's dtype."""
        start = nn.initializers.zeros if self.plus_one else nn.initializers.ones
        scale = self.param("scale", start, (x.shape[-1],))
        wide = at_least_fp32(x)
        wide = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + self.eps)
        factor = scale.astype(wide.dtype)
        factor = 1.0 + factor if self.plus_one else factor
        return (wide * over_last_axis(factor, wide.ndim)).astype(x.dtype)


class LayerNorm(nn.Module):
    """(x - mean) / √(variance + ε) · scale + bias over the last axis, in at least fp32 (Ba et al. 2016)."""

    eps: float

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """X [..., D] -> [..., D], in x's dtype."""
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],))
        bias = self.param("bias", nn.initializers.zeros, (x.shape[-1],))
        wide = at_least_fp32(x)
        wide = wide - jnp.mean(wide, axis=-1, keepdims=True)
        wide = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + self.eps)
        factor, shift = (over_last_axis(leaf.astype(wide.dtype), wide.ndim) for leaf in (scale, bias))
        return (wide * factor + shift).astype(x.dtype)


def norm_of(config: ModelConfig, name: str | None = None) -> RMSNorm | LayerNorm:
    """The norm of this config's kind."""
    if config.norm == "layer":
        return LayerNorm(config.norm_eps, name=name)
    return RMSNorm(config.norm_eps, config.norm_plus_one, name=name)


class Projection(nn.Module):
    """y = x W (+ b), then the interventions at `site`. W is int8 if it has a scale (`jaxsteer.models.quantise`)."""

    features: int
    bias: bool
    site: str

    @nn.compact
    def __call__(self, x: Array, steer: Steer) -> Array:
        """X [B, T, in] -> [B, T, features]."""
        kernel = self.param("kernel", nn.initializers.lecun_normal(), (x.shape[-1], self.features))
        bias = self.param("bias", nn.initializers.zeros, (self.features,)) if self.bias else None
        scale = self.get_variable("params", "scale") if self.has_variable("params", "scale") else None

        def product() -> Array:
            y = matmul(x, kernel.astype(x.dtype))
            if scale is not None:
                y = y * over_last_axis(scale.astype(y.dtype), y.ndim)
            return y if bias is None else y + over_last_axis(bias, y.ndim)

        weights = kernel if scale is None else dequantised(self.variables["params"])["kernel"]
        return steer.projection(self.site, x, weights, bias, product)


class Attention(nn.Module):
    """Causal self-attention with rotary positions and grouped key/value heads."""

    config: ModelConfig
    kernel: Kernel = "auto"

    @nn.compact
    def __call__(self, x: Array, inputs: Inputs, cache: LayerCache | None, steer: Steer) -> tuple[Array, KeysValues]:
        """Normalised x [B, T, D] -> the attention's contribution to the residual stream, and the keys and values."""
        c = self.config
        B, T, _ = x.shape

        def project(name: str, heads: int) -> Array:
            y = Projection(heads * c.head_dim, c.attn_bias or c.qkv_bias, f"attn.{name}", name=name)(x, steer)
            if name == "v" or c.qk_norm == "none":
                return y.reshape(B, T, heads, c.head_dim)
            norm = norm_of(c, f"{name}_norm")
            if c.qk_norm == "whole":
                return norm(y).reshape(B, T, heads, c.head_dim)
            return norm(y.reshape(B, T, heads, c.head_dim))

        q = rotate(project("q", c.heads), inputs.sin, inputs.cos)
        k = rotate(project("k", c.kv_heads), inputs.sin, inputs.cos)
        v = project("v", c.kv_heads)
        scores = Scores(c.query_scale, c.attn_softcap, c.window, inputs.local)
        new = KeysValues(k.swapaxes(1, 2), v.swapaxes(1, 2))
        if cache is None:
            heads = attention(q, k, v, inputs.span, kernel=self.kernel, scores=scores)
        else:
            heads, new = cache.attend(q, CachedKeys(*new, inputs.span), scores)
        heads = steer("attn.heads", x, checkpoint_name(heads, "attn.heads"))
        y = Projection(c.width, c.attn_bias, "attn.o", name="o")(heads.reshape(B, T, -1), steer)
        return steer("attn", x, _post_norm(c, y)), new


ACTIVATIONS: dict[str, Callable[[Array], Array]] = {"silu": nn.silu, "gelu_tanh": partial(nn.gelu, approximate=True)}


class MLP(nn.Module):
    """(act(x W_gate) ⊙ x W_up) W_down (gated, Shazeer 2020), or act(x W_up) W_down."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x: Array, steer: Steer) -> Array:
        """Normalised x [B, T, D] -> the MLP's contribution to the residual stream."""
        c = self.config
        act = ACTIVATIONS[c.activation]
        into = lambda name: Projection(c.mlp_width, c.mlp_bias, f"mlp.{name}", name=name)(x, steer)
        middle = act(into("gate")) * into("up") if c.gated else act(into("up"))
        y = Projection(c.width, c.mlp_bias, "mlp.down", name="down")(middle, steer)
        return steer("mlp", x, _post_norm(c, y))


def _post_norm(config: ModelConfig, y: Array) -> Array:
    """A sublayer's output, normalised if the model normalises what it adds to the residual stream."""
    return norm_of(config, "post_norm")(y) if config.post_norm else y


class Block(nn.Module):
    """One transformer block: h + attention(norm h), then + MLP(norm ·); the config says which norms there are."""

    config: ModelConfig
    kernel: Kernel = "auto"

    @nn.compact
    def __call__(self, h: Array, inputs: Inputs, cache: LayerCache | None, steer: Steer) -> tuple[Array, KeysValues]:
        """Residual stream h [B, T, D] -> the stream after the block, and the attention's keys and values."""
        c = self.config
        norm = lambda x, name: norm_of(c, name)(x) if c.pre_norm else x
        y, new = Attention(c, self.kernel, name="attn")(norm(h, "attn_norm"), inputs, cache, steer)
        middle = checkpoint_name(h + y, "residual")
        x = steer("mlp.in", middle, norm(middle, "mlp_norm"))
        out = checkpoint_name(middle + MLP(c, name="mlp")(x, steer), "residual")
        return steer("block", h, out), new


class Embed(nn.Module):
    """Token embedding E[tokens], times √D if it is scaled, plus P[positions] if positions are learned."""

    config: ModelConfig

    @nn.compact
    def __call__(self, tokens: Array, positions: Array) -> Array:
        """Tokens and their positions [B, T] -> [B, T, D]; NaN at a position beyond the learned ones."""
        shape = (self.config.vocab_size, self.config.width)
        embedding = self.param("embedding", nn.initializers.normal(0.02), shape)
        h = jnp.take(embedding, tokens, axis=0)
        h = h * jnp.array(self.config.width**0.5, h.dtype) if self.config.scaled_embedding else h
        if not self.config.learned_positions:
            return h
        learned = self.param("positions", nn.initializers.normal(0.02), (self.config.max_length, self.config.width))
        return h + jnp.take(learned, positions, axis=0)
