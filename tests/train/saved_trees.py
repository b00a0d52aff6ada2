"""Small trees to save, and what makes two of them the same; for the tests of checkpoints."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from train.run.checkpoints import open_checkpoints

ROOT = Path(__file__).parents[2]


def abstract(tree):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype) if isinstance(x, jax.Array) else x, tree)


def bits(x):
    if isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        return str(x.dtype), np.asarray(jax.random.key_data(x)).tobytes()
    return type(x), str(getattr(x, "dtype", "")), np.shape(x), np.asarray(x).tobytes()


def assert_same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for (path, x), y in zip(jax.tree_util.tree_leaves_with_path(a), jax.tree.leaves(b), strict=True):
        assert bits(x) == bits(y), jax.tree_util.keystr(path)


def run(code, *args):
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", code, *map(str, args)]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)


def small(value):
    return {"t": {"x": jnp.full((64,), float(value))}}


def save_three(folder):
    with open_checkpoints(folder, keep_latest=3) as checkpoints:
        for step in (1, 2, 3):
            checkpoints.save(step, small(step), {"at": step})
