"""Placing host arrays on the devices of a mesh, and which part of them a process needs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxsteer.io.stored import Place
from jaxsteer.ranges import Count, check_ranges
from jaxsteer.sharding import MeshShape, base_sharding, batch_sharding, default_shape, make_mesh, slices_of
from jaxsteer.types import Array, PyTree

B = TypeVar("B")


@dataclass(frozen=True)
class Placement:
    """Where arrays are placed: on a mesh of all processes' devices; None = on one device of this process."""

    mesh: Mesh | None

    def on_mesh(self) -> AbstractContextManager:
        """The context in which to trace and call functions of arrays on the mesh."""
        return nullcontext() if self.mesh is None else jax.set_mesh(self.mesh)

    def tree(self, tree: PyTree, like: PyTree) -> PyTree:
        """Place a tree with the shardings of `like`.

        Args:
            tree: whole values, the same on every process, or arrays on the mesh.
            like: a tree of the same structure, of arrays or `jax.ShapeDtypeStruct`s.
        """
        return tree if self.mesh is None else jax.tree.map(_put, tree, like)

    def copies(self, tree: PyTree) -> PyTree:
        """Copy a tree of whole values, the same on every process, to every device."""
        mesh = self.mesh
        if mesh is None:
            return tree
        replicated = NamedSharding(mesh, PartitionSpec())
        return jax.tree.map(
            lambda leaf: _put(leaf, jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=replicated)), tree
        )

    def own_rows(self, rows: int) -> range:
        """Which of a microbatch's `rows` rows this process's devices hold."""
        if self.mesh is None:
            return range(rows)
        shape = (rows, 1)
        indices = batch_sharding(shape, self.mesh).addressable_devices_indices_map(shape)
        spans = [index[0].indices(rows) for index in indices.values() if index is not None]
        return range(min(start for start, *_ in spans), max(stop for _, stop, _ in spans))

    def batch(self, batch: B, rows: int | None = None, first: int = 0) -> B:
        """Place the rows of a batch, or of what an objective takes around one, on their devices.

        Args:
            batch: numpy fields [B, T], or [M, B, T] with M microbatches.
            rows: B of the whole batch, if `batch` holds only this process's part of it.
            first: index of the first of these rows in the whole batch.
        """
        mesh = self.mesh
        if mesh is None:
            return jax.tree.map(jnp.asarray, batch)

        def put(field: np.ndarray) -> Array:
            shape = (*field.shape[:-2], field.shape[-2] if rows is None else rows, field.shape[-1])
            part = lambda span: slice(*(edge - first for edge in span.indices(shape[-2])[:2]))
            read = lambda index: field[(*index[:-2], part(index[-2]), index[-1])]
            return jax.make_array_from_callback(shape, batch_sharding(shape, mesh), read)

        return jax.tree.map(put, batch)

    @property
    def base(self) -> Place | None:
        """For a model loader: (path, shape) of a leaf of the base tree -> its sharding."""
        mesh = self.mesh
        if mesh is None:
            return None
        return lambda path, shape: base_sharding(path, shape, mesh)


def place_on(mesh: MeshConfig, rows: int, devices: Sequence[jax.Device] | None = None) -> Placement:
    """The placement that a config asks for.

    Args:
        mesh: sizes of the mesh's axes.
        rows: rows per microbatch, which the mesh's row axes must divide.
        devices: of a topology, for compiling ahead of time; by default those of all processes.

    Raises:
        ValueError: the devices cannot form that mesh.
    """
    available = jax.devices() if devices is None else devices
    shape = mesh.shape(len(available), rows, slices_of(available))
    if devices is None and jax.process_count() > 1 and shape.size < len(available):
        raise ValueError(
            f"mesh {shape}: uses {shape.size} of {len(available)} devices, but every process must use all of its own; "
            f"choose a microbatch (now {rows} rows) that {len(available)} divides, or split tensor too"
        )
    return Placement(None if shape.size == 1 and devices is None else make_mesh(shape, available))


def _put(leaf: Array | np.ndarray, like: Array | jax.ShapeDtypeStruct) -> Array:
    if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
        return leaf if leaf.sharding == like.sharding else jax.device_put(leaf, like.sharding)
    if like.sharding.is_fully_addressable:
        return jax.device_put(leaf, like.sharding)
    whole = np.asarray(leaf)
    return jax.make_array_from_callback(whole.shape, like.sharding, lambda index: whole[index])


@dataclass(frozen=True)
class MeshConfig:
    """How a run is spread over devices; by default over as many as divide a microbatch's rows equally."""

    data: Count | None = None
    """Data parallelism: number of copies of the base model, each of which computes a share of the rows."""
    fsdp: Count | None = None
    """Fully sharded data parallelism: number of shards of the base model and the rows. If neither this nor `data` is
    given, up to 16."""
    tensor: Count = 1
    """Tensor parallelism: number of shards of heads, MLP and vocabulary."""
    split_sequence: bool = False
    """Sequence parallelism: between sublayers, split the residual stream's positions over `tensor`, to save memory."""

    def __post_init__(self) -> None:
        """Reject axes that no mesh has."""
        check_ranges(self, "--mesh.")

    def shape(self, devices: int, rows: int, slices: int = 1) -> MeshShape:
        """The sizes of the mesh's axes.

        Args:
            devices: number of devices.
            rows: rows per microbatch.
            slices: number of TPU slices that the devices belong to.

        Raises:
            ValueError: axes that do not divide the number of devices.
        """
        given = [size for size in (self.data, self.fsdp, self.tensor) if size is not None]
        rest, left = divmod(devices, math.prod(given))
        if self.data is not None and self.fsdp is not None:
            return MeshShape(self.data, self.fsdp, self.tensor)
        if left or not rest:
            raise ValueError(
                f"mesh data={self.data} fsdp={self.fsdp} tensor={self.tensor}: cannot split {devices} devices this "
                "way; the product of the given axes must divide their number"
            )
        if self.data is None and self.fsdp is None:
            default = default_shape(rest, rows, slices)
            return MeshShape(default.data, default.fsdp, self.tensor)
        data, fsdp = (rest if size is None else size for size in (self.data, self.fsdp))
        return MeshShape(data, fsdp, self.tensor)


SINGLE = MeshConfig(1, 1, 1)
"""One device, even if there are more."""
