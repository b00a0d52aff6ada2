"""How host arrays get to the devices of a mesh, and which part of them a process needs."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxsteer.io.stored import Place
from jaxsteer.sharding import MeshShape, base_sharding, batch_sharding, default_shape, make_mesh, slices_of
from jaxsteer.types import Array, Batch, PyTree


@dataclass(frozen=True)
class Placement:
    """The devices that arrays go to: a mesh, of the devices of all processes; None for one device of this process."""

    mesh: Mesh | None

    def on_mesh(self) -> AbstractContextManager:
        """The context in which functions of arrays on the mesh are traced and called."""
        return nullcontext() if self.mesh is None else jax.set_mesh(self.mesh)

    def tree(self, tree: PyTree, like: PyTree) -> PyTree:
        """A tree of whole values, the same on every process, or of arrays on the mesh, with the shardings of `like`."""
        return tree if self.mesh is None else jax.tree.map(_put, tree, like)

    def copies(self, tree: PyTree) -> PyTree:
        """A tree of whole values, the same on every process, copied to every device."""
        mesh = self.mesh
        if mesh is None:
            return tree
        everywhere = NamedSharding(mesh, PartitionSpec())
        return jax.tree.map(
            lambda leaf: _put(leaf, jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=everywhere)), tree
        )

    def own_rows(self, rows: int) -> range:
        """Those of so many rows (of a microbatch) that this process's devices hold."""
        if self.mesh is None:
            return range(rows)
        shape = (rows, 1)
        where = batch_sharding(shape, self.mesh).addressable_devices_indices_map(shape)
        parts = [index[0].indices(rows) for index in where.values() if index is not None]
        return range(min(start for start, *_ in parts), max(stop for _, stop, _ in parts))

    def batch(self, batch: Batch, rows: int | None = None, first: int = 0) -> Batch:
        """Put a batch's rows on their devices.

        Args:
            batch: fields [B, T] or [M, B, T], numpy.
            rows: B of the whole batch where `batch` has a part of its rows, this process's.
            first: number of the first row there.
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
        """What a loader asks where a leaf of the base tree lies, (path, shape) -> sharding."""
        mesh = self.mesh
        if mesh is None:
            return None
        return lambda path, shape: base_sharding(path, shape, mesh)


def place_on(mesh: MeshConfig, rows: int, devices: Sequence[Any] | None = None) -> Placement:
    """The placement that a config asks for on these devices, by default those of all processes.

    Args:
        mesh: sizes of its axes.
        rows: of a batch (a microbatch), which the mesh's row axes are to divide.
        devices: those of a topology, for compiling ahead of time.

    Raises:
        ValueError: the devices do not make that mesh.
    """
    found = jax.devices() if devices is None else devices
    shape = mesh.shape(len(found), rows, slices_of(found))
    if devices is None and jax.process_count() > 1 and shape.size < len(found):
        raise ValueError(
            f"mesh {shape}: uses {shape.size} of {len(found)} devices, but every process must take part with all of "
            f"its own; choose rows (of a microbatch, now {rows}) that {len(found)} divides, or split tensor too"
        )
    return Placement(None if shape.size == 1 and devices is None else make_mesh(shape, found))


def _put(leaf: Any, like: Any) -> Array:
    if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
        return leaf if leaf.sharding == like.sharding else jax.device_put(leaf, like.sharding)
    if like.sharding.is_fully_addressable:
        return jax.device_put(leaf, like.sharding)
    whole = np.asarray(leaf)
    return jax.make_array_from_callback(whole.shape, like.sharding, lambda index: whole[index])


@dataclass(frozen=True)
class MeshConfig:
    """How a run is spread over the devices; by default over as many as can share a microbatch's rows equally."""

    data: int | None = None
    """Copies of the base, each with a part of the rows."""
    fsdp: int | None = None
    """Parts that the base and the rows are split into. Where neither is given, up to 16."""
    tensor: int = 1
    """Parts that heads, MLP and vocabulary are split into."""
    split_sequence: bool = False
    """Split the residual stream's positions over `tensor` too, between sublayers: less memory."""

    def shape(self, devices: int, rows: int, slices: int = 1) -> MeshShape:
        """The mesh on so many devices, which are so many TPU slices, for a microbatch of so many rows.

        Raises:
            ValueError: an axis below 1, or one that does not divide the devices.
        """
        rest, left = divmod(devices, max(1, self.tensor) * max(1, self.data or 1) * max(1, self.fsdp or 1))
        if self.data is not None and self.fsdp is not None:
            return MeshShape(self.data, self.fsdp, self.tensor)
        if left or not rest:
            raise ValueError(
                f"mesh data={self.data} fsdp={self.fsdp} tensor={self.tensor}: {devices} devices cannot be split so; "
                "each given axis must divide their number"
            )
        if self.data is None and self.fsdp is None:
            whole = default_shape(rest, rows, slices)
            return MeshShape(whole.data, whole.fsdp, self.tensor)
        return MeshShape(self.data or rest, self.fsdp or rest, self.tensor)


SINGLE = MeshConfig(1, 1, 1)
"""One device, however many there are."""
