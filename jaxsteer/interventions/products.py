"""The products of a method with its parameters: of one adapter, or of several of which each token has its own.

With `Context.adapter`, parameters have an axis of E adapters more (`ParamSpec.adapter_axis`). The skinny products of
all adapters are then one product of E · R columns, from which each token takes its own R; what it writes goes through
one product too, with zeros in the columns of the other adapters. Up to E tokens, as in decoding a few rows, read only
their own factors instead. A method whose `apply` uses these functions throughout declares `per_token`.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxsteer.matmul import matmul
from jaxsteer.types import Array, Context


def read(a: Array, x: Array, ctx: Context) -> Array:
    """A x: a [R, D], or [E, R, D] of several adapters, and x [..., D] -> [..., R]."""
    if ctx.adapter is None:
        return jnp.einsum("...d,rd->...r", x, a)
    E, R, D = a.shape
    if ctx.adapter.size <= E:
        return _steered(jnp.einsum("btd,btrd->btr", x, _own(a, 0, ctx)), E, ctx)
    every = jnp.einsum("btd,kd->btk", x, a.reshape(E * R, D)).reshape(*x.shape[:-1], E, R)
    return jnp.sum(jnp.where(ctx.own(E)[..., None], every, 0), axis=-2)


def write(b: Array, z: Array, ctx: Context) -> Array:
    """B z: b [D, R], or [D, E, R] of several adapters, and z [..., R] -> [..., D]."""
    if ctx.adapter is None:
        return matmul(z, b.T)
    D, E, R = b.shape
    if ctx.adapter.size <= E:
        return jnp.einsum("btr,btdr->btd", _steered(z, E, ctx), _own(b, 1, ctx))
    return jnp.einsum("btk,dk->btd", _in_own_columns(z, E, ctx), b.reshape(D, E * R))


def write_rows(r: Array, z: Array, ctx: Context) -> Array:
    """Rᵀ z: r [R, D], or [E, R, D] of several adapters, and z [..., R] -> [..., D]."""
    if ctx.adapter is None:
        return matmul(z, r)
    E, R, D = r.shape
    if ctx.adapter.size <= E:
        return jnp.einsum("btr,btrd->btd", _steered(z, E, ctx), _own(r, 0, ctx))
    return jnp.einsum("btk,kd->btd", _in_own_columns(z, E, ctx), r.reshape(E * R, D))


def vector(v: Array, ndim: int, ctx: Context) -> Array:
    """A vector [*dims] to broadcast over tokens in `ndim` axes; of several, [E, *dims], each token's: [B, T, *dims].

    Tokens without an adapter get zeros.
    """
    if ctx.adapter is None:
        return v.reshape((1,) * (ndim - v.ndim) + v.shape)
    return _steered(_own(v, 0, ctx), len(v), ctx)


def _own(leaf: Array, axis: int, ctx: Context) -> Array:
    """Each token's part of a parameter with E adapters at an axis, [B, T, ...]; any part, if it has no adapter."""
    assert ctx.adapter is not None
    take = lambda index: jax.lax.dynamic_index_in_dim(leaf, index, axis, keepdims=False)
    return jax.vmap(jax.vmap(take))(jnp.clip(ctx.adapter, 0, leaf.shape[axis] - 1))


def _steered(value: Array, adapters: int, ctx: Context) -> Array:
    """The value [B, T, ...] at tokens that have an adapter, 0 elsewhere."""
    steered = jnp.any(ctx.own(adapters), axis=-1)
    return jnp.where(steered.reshape(steered.shape + (1,) * (value.ndim - steered.ndim)), value, 0)


def _in_own_columns(z: Array, adapters: int, ctx: Context) -> Array:
    """z [..., R] in the columns of each token's adapter, zeros in those of the others: [..., E · R]."""
    wide = jnp.where(ctx.own(adapters)[..., None], z[..., None, :], 0)
    return wide.reshape(*z.shape[:-1], adapters * z.shape[-1])
