"""Random weights and tokens, made on the device: a model as large as the shapes say, without files."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from jaxsteer.batches import make_batch
from jaxsteer.models.config import ModelConfig
from jaxsteer.types import Array, Batch, PyTree
from train.plan.programs import base_shapes

STD = 0.02
"""Standard deviation of the weights."""


def base_shapes_of(config: ModelConfig, dtype: DTypeLike) -> PyTree:
    """The base tree as `jax.ShapeDtypeStruct`s."""
    scalar: Any = jnp.dtype(dtype).type
    return base_shapes(config, scalar)


def random_base(config: ModelConfig, dtype: DTypeLike) -> PyTree:
    """Random weights in the layout of `init_base`; norms scale by 1.

    Made leaf by leaf and layer by layer, so that nothing larger than the weights is ever in memory.
    """
    shapes = base_shapes_of(config, dtype)
    paths = jax.tree_util.tree_leaves_with_path(shapes)
    leaves = [_leaf(leaf.shape, leaf.dtype, str(path[-1]), number) for number, (path, leaf) in enumerate(paths)]
    return jax.tree.unflatten(jax.tree.structure(shapes), leaves)


def _leaf(shape: tuple[int, ...], dtype: DTypeLike, name: str, number: int) -> Array:
    if "scale" in name:
        return jnp.ones(shape, dtype)
    return _normal(shape, jnp.dtype(dtype).name, number)


@partial(jax.jit, static_argnums=(0, 1))
def _normal(shape: tuple[int, ...], dtype: str, seed: Array) -> Array:
    """Normal numbers, one index of the leading axis at a time."""
    keys = jax.random.split(jax.random.key(seed), shape[0])
    draw = lambda key: (STD * jax.random.normal(key, shape[1:], jnp.float32)).astype(dtype)
    # Many rows of an embedding at a time: a loop over each would take longer than the draws.
    return jax.lax.map(draw, keys, batch_size=None if len(shape) > 2 else 4096)


def random_batch(config: ModelConfig, rows: int, length: int) -> Batch:
    """Rows of random tokens, each one example, with a loss at every position."""
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, (rows, length)).astype(np.int32)
    return make_batch(jnp.asarray(tokens), weights=jnp.ones((rows, length), jnp.float32))
