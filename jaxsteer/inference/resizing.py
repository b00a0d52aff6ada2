"""Rows that change: more or fewer of them, other numbers of slots, rows that are freed or cleared.

Keys and values by layers go through one small program, layer by layer: a program for all of them compiles longer.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from jaxsteer.inference.rows import Rows, place, replicate
from jaxsteer.models.by_layer import is_by_layer, on_cache
from jaxsteer.models.layers import KeysValues
from jaxsteer.sharding import constrain
from jaxsteer.types import Array, Cache


def resize(rows: Rows, kept: Array, prompt: int, ring: int) -> Rows:
    """Some of the rows, with other numbers of slots: each step computes all rows and reads all slots, used or not.

    Args:
        rows: as they are.
        kept: int32 [n], the indices of the rows that stay; one past the last row is a free one.
        prompt: slots for the tokens of a prompt.
        ring: slots for generated tokens, no fewer than any active row has been decoded for.
    """
    static = {"old": rows.prompt_slots, "prompt": prompt, "ring": ring}
    k, v = _each(_resize_layers, rows.cache, kept, rows.cache.used, **static)
    bare = replace(rows, cache=rows.cache._replace(k=(), v=()))
    rows = _resize_rest(bare, kept, **static)
    return replace(rows, cache=rows.cache._replace(k=k, v=v))


def free_rows(rows: Rows, mask: Array) -> Rows:
    """Mark the rows in the mask, bool [B], as done."""
    return replace(rows, progress=rows.progress._replace(done=_marked(rows.progress.done, mask)))


def clear_rows(rows: Rows, mask: Array) -> Rows:
    """Zero the cache of the rows in the mask, bool [B]: a NaN in it would reach the next prompt. `rows` are donated."""
    k, v = _each(_clear_layers, rows.cache, mask)
    return replace(rows, cache=rows.cache._replace(k=k, v=v))


def _each(program: Callable[..., KeysValues], cache: Cache, *args: Any, **static: Any) -> KeysValues:
    """A program on keys and values, as a stack or one layer after the other."""
    if not is_by_layer(cache.k):
        return program(KeysValues(cache.k, cache.v), *args, **static)
    layers = [program(KeysValues((k,), (v,)), *args, **static) for k, v in zip(cache.k, cache.v, strict=True)]  # type: ignore[arg-type]
    return KeysValues(tuple(layer.k[0] for layer in layers), tuple(layer.v[0] for layer in layers))  # type: ignore[arg-type]


@partial(jax.jit, static_argnames=("old", "prompt", "ring"))
def _resize_layers(layers: KeysValues, kept: Array, used: Array, *, old: int, prompt: int, ring: int) -> KeysValues:
    slots = partial(_resize_slots, used=used, old=old, prompt=prompt, ring=ring)
    return _place_layers(on_cache(lambda layer, axis: slots(_take(layer, kept), axis), layers))


@partial(jax.jit, static_argnames=("old", "prompt", "ring"))
def _resize_rest(rows: Rows, kept: Array, *, old: int, prompt: int, ring: int) -> Rows:
    """Everything but keys and values."""
    cache, before = rows.cache, rows.ring
    slots = lambda field: _resize_slots(_take(field, kept), 1, used=cache.used, old=old, prompt=prompt, ring=ring)
    next_slot = cache.used - old
    if ring != before:  # in the order of its steps: behind the old slots, or at the oldest
        next_slot = jnp.full_like(next_slot, before if ring > before else 0)
    cache = cache._replace(
        segments=slots(cache.segments), positions=slots(cache.positions), used=(prompt + next_slot).astype(jnp.int32)
    )
    free = kept >= len(rows.progress.done)
    settings, progress = jax.tree.map(lambda field: _take(field, kept), (rows.settings, rows.progress))
    progress = progress._replace(done=progress.done | free)
    return place(replace(rows, cache=cache, settings=settings, progress=progress, ring=ring))


def _take(field: Array, kept: Array) -> Array:
    """Rows by their indices; zeros for an index past the last."""
    return jnp.take(field, kept, axis=0, mode="fill", fill_value=field.dtype.type(0))


def _resize_slots(field: Array, axis: int, *, used: Array, old: int, prompt: int, ring: int) -> Array:
    """Other numbers of slots on an axis that has `old` ones for prompts, followed by the ring."""
    pad = lambda part, slots: jnp.pad(part, [(0, slots if i == axis else 0) for i in range(field.ndim)])
    prompts = jax.lax.slice_in_dim(field, 0, min(old, prompt), axis=axis)
    turning = jax.lax.slice_in_dim(field, old, None, axis=axis)
    before = turning.shape[axis]
    if ring != before:
        turning = jnp.roll(turning, old - used, axis)  # the oldest first
        turning = jax.lax.slice_in_dim(turning, max(0, before - ring), None, axis=axis)
    return jnp.concatenate([pad(prompts, max(0, prompt - old)), pad(turning, max(0, ring - before))], axis)


@partial(jax.jit, donate_argnames="layers")
def _clear_layers(layers: KeysValues, mask: Array) -> KeysValues:
    clear = lambda layer, axis: jnp.where(mask[:, None, None, None], jnp.zeros((), layer.dtype), layer)
    return _place_layers(on_cache(clear, layers))


def _place_layers(layers: KeysValues) -> KeysValues:
    """On a mesh: split by rows and heads."""
    split = lambda x: constrain(x, *(None,) * (x.ndim - 4), "rows", "heads", None, None)
    return jax.tree.map(split, layers)


@jax.jit
def _marked(done: Array, mask: Array) -> Array:
    return replicate(done | mask)
