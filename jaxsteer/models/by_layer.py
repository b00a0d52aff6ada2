"""Weights and caches as tuples of layers: what a CPU decodes with, one layer after the other instead of a scan.

A scan slices its stacked weights, and on a CPU each slice is a copy: reading and writing the model once more for every
token. A tuple of layers is read in place, and each layer's cache is updated in place.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from jaxsteer.models.attention import Span
from jaxsteer.models.layers import KeysValues, LayerCache, OwnCache, StackedCache
from jaxsteer.sharding import constrain, current_mesh
from jaxsteer.types import Array, Batch, Cache, PyTree, Steering, Taps

BlockFunction = Callable[[PyTree, Array, Array, Steering | None], tuple[Array, tuple[Taps, KeysValues | None]]]
"""(weights, h, layer, steering) -> (h, (taps, keys and values)), see `jaxsteer.models.transformer.block_function`."""


def is_by_layer(stack: PyTree) -> bool:
    """Whether weights or keys are a tuple of layers instead of arrays with a leading axis L."""
    return isinstance(stack, tuple)


def layers_to_decode(base: PyTree) -> tuple[PyTree, ...] | None:
    """The base's blocks as a tuple of layers, where that is how to decode: on a single CPU device. None elsewhere.

    The layers share the memory of the stacked arrays.
    """
    stacks, structure = jax.tree.flatten(base.get("blocks"))
    if not stacks or current_mesh() is not None or not all(map(_on_one_cpu, stacks)):
        return None
    return tuple(jax.tree.unflatten(structure, own) for own in zip(*map(_layers_of, stacks), strict=True))


def _on_one_cpu(leaf: Array) -> bool:
    """Whether a leaf is an array, not one that is traced, on a single CPU device."""
    if isinstance(leaf, jax.core.Tracer) or not isinstance(leaf, jax.Array):
        return False
    return [device.platform for device in leaf.devices()] == ["cpu"]


def _layers_of(stack: Array) -> list[Array]:
    """One array for each layer, in the memory of the stack if that is aligned for it."""
    # A layer that is committed to a device where its stack is not would compile every program that it meets twice.
    device = next(iter(stack.devices())) if stack.committed else None
    return [jax.device_put(layer, device, may_alias=True) for layer in np.asarray(stack)]


def run_layers(
    block: BlockFunction, weights: tuple[PyTree, ...], h: Array, per_layer: Steering
) -> tuple[Array, PyTree]:
    """`block` over a tuple of layers: the last h, and the taps [L, ...] and the layers' keys and values, in tuples."""
    outputs = []
    for layer, own in enumerate(weights):
        p = jax.tree.map(lambda leaf, i=layer: leaf[i], per_layer)
        h, output = block(own, h, np.int32(layer), p)  # type: ignore[arg-type]  # numpy: known when it is traced
        outputs.append(output)
    taps, new = zip(*outputs, strict=True)
    stacked = jax.tree.map(lambda *each: jnp.stack(each), *taps)
    by_layer = lambda keys_values: KeysValues(*map(tuple, zip(*keys_values, strict=True)))  # type: ignore[arg-type]
    return h, (stacked, None if new[0] is None else by_layer(new))


def on_cache(f: Callable[[Array, int], Array], cache: Cache | KeysValues) -> KeysValues:
    """f(layer, axis of S) of the keys and of the values of each layer, [B, K, S, H] or with keys as columns."""

    def on(stack: PyTree, axis: int) -> PyTree:
        if is_by_layer(stack):
            return tuple(f(layer, axis) for layer in stack)
        return jax.vmap(lambda layer: f(layer, axis))(stack)

    return KeysValues(on(cache.k, 3 if is_by_layer(cache.k) else 2), on(cache.v, 2))


def put_rows(old: KeysValues, new: KeysValues, row: Array) -> KeysValues:
    """A cache's keys and values with those of some rows replaced, from their first entry. Not for use under jit.

    Args:
        old: of B rows, as in a `Cache`; donated.
        new: a stack for n rows, [L, n, K, W, H].
        row: int32 [n], which rows; B or more: nothing is put anywhere.
    """
    if not is_by_layer(old.k):
        return _put_in_stack(old, new, row)
    # One program for all layers: in a single one, the many updates would take long to compile.
    put = [put_in_layer(KeysValues(*own), new, row, np.int32(i)) for i, own in enumerate(zip(*old, strict=True))]
    return KeysValues(tuple(each.k for each in put), tuple(each.v for each in put))  # type: ignore[arg-type]  # by layers


@partial(jax.jit, donate_argnums=0)
def _put_in_stack(old: KeysValues, new: KeysValues, row: Array) -> KeysValues:
    put = lambda old, new: old.at[:, row, :, : new.shape[3]].set(new.astype(old.dtype), mode="drop")
    stack = lambda x: constrain(x, None, "rows", "heads", None, None)
    return KeysValues(stack(put(old.k, new.k)), stack(put(old.v, new.v)))


@partial(jax.jit, donate_argnums=0)
def put_in_layer(old: KeysValues, new: KeysValues, row: Array, layer: ArrayLike) -> KeysValues:
    """`put_rows` of one layer [B, K, H, S] and [B, K, S, H], given its index int32 [] in the stack; it is donated."""
    k, v = (jax.lax.dynamic_index_in_dim(stack, layer, keepdims=False) for stack in new)
    width = k.shape[2]
    return KeysValues(
        old.k.at[row, :, :, :width].set(k.swapaxes(2, 3).astype(old.k.dtype), mode="drop"),
        old.v.at[row, :, :width].set(v.astype(old.v.dtype), mode="drop"),
    )


def split_cache(cache: Cache) -> Cache:
    """A stacked cache by layers: its values are a tuple of [B, K, S, H], its keys of [B, K, H, S]."""
    k, v = tuple(cache.k.swapaxes(3, 4)), tuple(cache.v)
    return cache._replace(k=k, v=v)  # type: ignore[arg-type]  # where a stack is declared


def layer_caches(cache: Cache | None, batch: Batch) -> Callable[[Array], LayerCache | None]:
    """Layer index -> the layer's cache, as a block needs it to read a batch."""
    if cache is None:
        return lambda layer: None
    if not is_by_layer(cache.k):
        return lambda layer: StackedCache(cache, layer)
    span = Span(*_noted(cache, batch))
    return lambda layer: OwnCache(cache.k[layer], cache.v[layer], span, cache.used)


def extended(cache: Cache, new: KeysValues, batch: Batch) -> Cache:
    """The cache with the keys and values of a batch in its first free slots.

    Args:
        cache: before the batch was read.
        new: what the blocks returned: the new keys and values [L, B, K, T, H], or the layers' arrays that hold them.
        batch: [B, T].
    """
    if not is_by_layer(cache.k):
        at = (0, 0, 0, cache.used, 0)
        write = lambda old, new: jax.lax.dynamic_update_slice(old, new.astype(old.dtype), at)
        new = KeysValues(write(cache.k, new.k), write(cache.v, new.v))
    return Cache(new.k, new.v, *_noted(cache, batch), cache.used + batch.tokens.shape[1])


def _noted(cache: Cache, batch: Batch) -> tuple[Array, Array]:
    """Segments and positions of the cache's entries with those of a batch in the first free slots."""
    write = lambda old, new: jax.lax.dynamic_update_slice(old, new, (0, cache.used))
    return write(cache.segments, batch.segments), write(cache.positions, batch.positions)
