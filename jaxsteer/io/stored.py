"""From named tensors in files to the base tree: one checked, layer-by-layer read for every format."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxsteer.models.config import ModelConfig
from jaxsteer.models.families import Family, Row
from jaxsteer.types import PyTree

Progress = Callable[[int, int], None]
"""(bytes read so far, bytes in all)"""

Place = Callable[[str, np.ndarray], jax.Array]
"""(path in the base tree, the whole stacked leaf) -> the array on its device or devices."""

MISSING_LIMIT = 1000


@dataclass(frozen=True)
class Stored:
    """A tensor in a file. shape is numpy's (slowest axis first); `read` returns a float array of it."""

    shape: tuple[int, ...]
    nbytes: int
    read: Callable[[], np.ndarray]


def read_base(
    stored: Mapping[str, Stored],
    layout: str,
    family: Family,
    config: ModelConfig,
    where: str,
    *,
    dtype: Any = jnp.float32,
    progress: Progress | None = None,
    place: Place | None = None,
) -> PyTree:
    """Read a base tree, one stacked leaf after the other, one tensor at a time.

    Besides the result, one leaf and one tensor are held in memory.

    Args:
        stored: the tensors of the file or files, by their published names.
        layout: "hf" or "gguf", the naming that they follow.
        family: whose table says what is what.
        config: the model's features.
        where: the file or folder, for messages.
        dtype: of the result; values are rounded to nearest.
        progress: called after every tensor.
        place: puts a leaf on its devices; by default `jnp.asarray`.

    Raises:
        ValueError: tensors that are missing, unknown or of the wrong shape, all named in one message.
    """
    rows = family.parameters(config)
    check_names(stored, layout, family, config, where)
    total = sum(stored[name].nbytes for row in rows for name in names(row, layout, config))
    done = 0
    base: dict[str, Any] = {}
    for row in rows:
        shape = row.shape(config)
        leaf = np.empty((config.layers, *shape) if row.stacked else shape, jnp.dtype(dtype))
        for i, name in enumerate(names(row, layout, config)):
            ours = transform(row, layout).read(stored[name].read(), config)
            leaf[i if row.stacked else ...] = ours
            done += stored[name].nbytes
            if progress is not None:
                progress(done, total)
        _put(base, row.path, jnp.asarray(leaf) if place is None else place(row.path, leaf))
    return base


def names(row: Row, layout: str, config: ModelConfig) -> list[str]:
    """The published names of a row's tensors, one a layer or just one."""
    name = getattr(row, layout)
    return [name.replace("{i}", str(i)) for i in range(config.layers)] if row.stacked else [name]


def transform(row: Row, layout: str) -> Any:
    """The row's change of layout for this kind of file."""
    return row.gguf_transform or row.transform if layout == "gguf" else row.transform


def check_names(stored: Mapping[str, Stored], layout: str, family: Family, config: ModelConfig, where: str) -> None:
    """Compare names and shapes with what the family's table expects.

    Raises:
        ValueError: naming every tensor that is missing, unknown, or of another shape than expected.
    """
    missing, misshapen, expected = [], [], set()
    for row in family.parameters(config):
        shape = row.shape(config)
        theirs = shape[::-1] if transform(row, layout).flips else shape
        for i in range(config.layers if row.stacked else 1):
            name = getattr(row, layout).replace("{i}", str(i))
            expected.add(name)
            if name not in stored:
                missing.append(name)
            elif stored[name].shape != theirs:
                misshapen.append(f"{name} has shape {list(stored[name].shape)}, expected {list(theirs)}")
            if len(missing) > MISSING_LIMIT:  # a config that promises a billion layers
                break
    tied = {getattr(row, layout) for row in family.rows if row.unless == "tied_head"}
    surplus = [
        name
        for name in stored
        if name not in expected
        and not any(re.fullmatch(pattern, name) for pattern in family.harmless)
        and not (config.tied_head and name in tied and _repeats_embedding(stored, name, layout, family))
    ]
    problems = [
        f"{title}: {', '.join(found)}"
        for title, found in (("missing", missing), ("unknown", surplus), ("misshapen", misshapen))
        if found
    ]
    if problems:
        raise ValueError(
            f"{where}: the tensors are not those of a {family.name} model with this config. "
            + "; ".join(problems)
            + ". Check that config and weights belong together"
        )


def _repeats_embedding(stored: Mapping[str, Stored], name: str, layout: str, family: Family) -> bool:
    """Whether the head that is stored in spite of being tied is the embedding once more."""
    embedding = next(getattr(row, layout) for row in family.rows if row.path == "embed/embedding")
    if embedding not in stored or stored[embedding].shape != stored[name].shape:
        return False
    return bool(np.array_equal(stored[embedding].read(), stored[name].read()))


def _put(tree: dict[str, Any], path: str, leaf: Any) -> None:
    *parents, last = path.split("/")
    for key in parents:
        tree = tree.setdefault(key, {})
    tree[last] = leaf


def get(tree: Mapping[str, Any], path: str) -> Any:
    """The leaf at a path, or None."""
    node: Any = tree
    for key in path.split("/"):
        if not isinstance(node, Mapping) or key not in node:
            return None
        node = node[key]
    return node


def size(shape: tuple[int, ...]) -> int:
    """Number of elements, in Python's integers: a header that lies must not overflow."""
    return math.prod(shape)
