"""A pytree as named leaves, each with dtype, shape and sha256, for the record of a checkpoint."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from jaxsteer.types import PyTree

_CHUNK = 1 << 26  # bytes fetched at once from an array that is sharded over processes


class SaveError(ValueError):
    """A checkpoint or a line of metrics could not be written; earlier ones are intact."""


class MismatchError(ValueError):
    """The request does not match what was saved: nothing is damaged, and an earlier step would not help."""


def named_leaves(tree: PyTree) -> dict[str, Any]:
    """The leaves by path, in tree order, such as "0/mu/late/block/up"; None is not a leaf.

    Raises:
        ValueError: two leaves have the same path, as in {"a": {"b": x}, "a/b": y}.
    """
    out: dict[str, Any] = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        name = jax.tree_util.keystr(path, simple=True, separator="/") or "leaf"
        if name in out:
            raise ValueError(f"two leaves of a tree have the path {name!r}; rename a key")
        out[name] = leaf
    return out


def is_number(leaf: Any) -> bool:
    """Whether it is a Python number, which is stored in the record itself."""
    return isinstance(leaf, (bool, int, float)) and not isinstance(leaf, np.generic)


def has_arrays(leaf: Any) -> bool:
    """Whether there is an array to store: TensorStore has no arrays without elements."""
    return not is_number(leaf) and leaf.size > 0


def _is_key(leaf: Any) -> bool:
    return hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def form(leaf: Any, where: str) -> dict[str, Any]:
    """Dtype and shape as in the record; for a Python number, its type."""
    if is_number(leaf):
        return {"dtype": f"python {type(leaf).__name__}", "shape": []}
    if not hasattr(leaf, "dtype") or not hasattr(leaf, "shape") or leaf.dtype == object:
        raise ValueError(f"{where}: a {type(leaf).__name__} cannot be checkpointed; need an array or a number")
    return {"dtype": str(leaf.dtype), "shape": list(leaf.shape)}


def describe(leaf: Any, where: str) -> dict[str, Any]:
    """A leaf's entry in the record."""
    own = form(leaf, where)
    if is_number(leaf):
        return own | {"value": repr(leaf)}
    if _is_key(leaf):
        own["impl"] = str(jax.random.key_impl(leaf))
    return own | {"sha256": digest_of(leaf)}


def digest_of(leaf: Any) -> str:
    """sha256 of the stored array's bytes, independent of its sharding."""
    digest = hashlib.sha256()
    for part in _host(stored(leaf)):
        digest.update(np.ascontiguousarray(part).reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def _host(array: Any) -> Iterator[np.ndarray]:
    """The values on the host, in parts along the first axis if the array is sharded over processes."""
    if not isinstance(array, jax.Array) or array.is_fully_addressable:
        yield np.asarray(array)
    elif array.is_fully_replicated:
        yield np.asarray(array.addressable_data(0))
    else:
        rows = max(1, min(array.shape[0], _CHUNK * array.shape[0] // array.nbytes))
        for start in range(0, array.shape[0], rows):
            size = min(rows, array.shape[0] - start)
            yield np.asarray(multihost_utils.process_allgather(_rows(array, start, size), tiled=True))


_rows = jax.jit(lambda array, start, size: jax.lax.dynamic_slice_in_dim(array, start, size), static_argnums=2)


def stored(leaf: Any) -> Any:
    """The array that is stored for a leaf: a key's data, else the leaf itself."""
    if _is_key(leaf):
        return jax.random.key_data(leaf)
    return np.asarray(leaf) if isinstance(leaf, np.generic) else leaf


def _placement(leaf: Any) -> jax.sharding.Sharding:
    """Where to put a restored leaf: like `leaf`, else on the first device (replicated, with several processes)."""
    if getattr(leaf, "sharding", None) is not None:
        return leaf.sharding
    if jax.process_count() == 1:
        return jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    mesh = jax.sharding.Mesh(np.array(jax.devices()), ("all",))
    return jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())


def target(leaf: Any) -> Any:
    """What to ask Orbax for."""
    if isinstance(leaf, (np.ndarray, np.generic)):
        return np.asarray(leaf)
    if _is_key(leaf):
        words = jax.eval_shape(jax.random.key_data, leaf)
        return jax.ShapeDtypeStruct(words.shape, words.dtype, sharding=_placement(leaf))
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=_placement(leaf))


def restored_leaf(like: Any, array: Any, saved: Mapping[str, Any]) -> Any:
    """The leaf, of the same kind as `like`, from its record and the stored array (None if there is none)."""
    if is_number(like):
        return saved["value"] == "True" if isinstance(like, bool) else type(like)(saved["value"])
    if isinstance(like, np.generic):
        return array[()]
    if array is None:
        words = target(like)
        array = np.zeros(words.shape, words.dtype)
        array = array if isinstance(like, np.ndarray) else jax.device_put(array, words.sharding)
    return jax.random.wrap_key_data(array, impl=saved["impl"]) if _is_key(like) else array


def check(saved: Mapping[str, Any], like: Mapping[str, Any], where: str) -> None:
    """Check that the requested leaves are those saved, before anything is read.

    Raises:
        MismatchError: names the leaves that are missing or left over, or the first with another dtype or shape.
    """
    missing, extra = sorted(like.keys() - saved.keys()), sorted(saved.keys() - like.keys())
    if missing or extra:
        raise MismatchError(
            f"{where}: different structure: not in the checkpoint {missing[:5]}, "
            f"only in the checkpoint {extra[:5]}; restore with the settings it was saved with"
        )
    for path, leaf in like.items():
        own = form(leaf, f"{where}/{path}")
        if (saved[path]["dtype"], saved[path]["shape"]) != (own["dtype"], own["shape"]):
            raise MismatchError(
                f"{where}/{path}: the checkpoint has {saved[path]['dtype']} {saved[path]['shape']}, "
                f"requested {own['dtype']} {own['shape']}; restore what was saved, and convert afterwards"
            )
