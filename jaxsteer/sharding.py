"""Sharding over a mesh of devices: one table of logical axes, and the shardings of every tree that follow from it.

A mesh has three axes. `data` replicates the base and splits the batch's rows; `fsdp` splits the rows and the base (each
layer's weights are gathered when they are used); `tensor` splits heads, the MLP and the vocabulary. Programs run inside
`jax.set_mesh(mesh)`; without a mesh, every constraint here is the identity.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
import optax
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxsteer.types import Array, Batch, ParamSpec, PyTree

AXES = ("data", "fsdp", "tensor")
Axes = tuple[str | None, ...]

RULES: dict[str, tuple[str, ...]] = {
    "rows": ("data", "fsdp"),
    "sequence": ("tensor",),  # of the residual stream, with Model.split_sequence
    "vocab": ("tensor",),
    "heads": ("tensor",),
    "mlp": ("tensor",),
    "width": ("fsdp",),
    "in": ("fsdp",),  # of LoRA and its variants
    "out": ("fsdp",),
}
"""Logical axis -> mesh axes. Axes that are not listed (layers, rank, head_dim, ...) are not split, nor are dimensions
that the mesh axes do not divide."""

BASE_AXES: dict[str, Axes] = {
    "embedding": ("vocab", "width"),
    "positions": (None, "width"),
    "q/kernel": ("width", "heads"),
    "k/kernel": ("width", "heads"),
    "v/kernel": ("width", "heads"),
    "o/kernel": ("heads", "width"),
    "gate/kernel": ("width", "mlp"),
    "up/kernel": ("width", "mlp"),
    "down/kernel": ("mlp", "width"),
}
"""Logical axes of the base's matrices, for one layer, by the end of their path. Vectors are replicated."""


@dataclass(frozen=True)
class MeshShape:
    """Sizes of the mesh axes; their product is the number of devices."""

    data: int = 1
    fsdp: int = 1
    tensor: int = 1

    def __post_init__(self) -> None:
        """Reject empty axes."""
        if min(self.data, self.fsdp, self.tensor) < 1:
            raise ValueError(f"mesh {self}: every axis needs at least 1 device")

    def __str__(self) -> str:
        """For example "data 1 x fsdp 4 x tensor 2"."""
        return f"data {self.data} x fsdp {self.fsdp} x tensor {self.tensor}"

    @property
    def size(self) -> int:
        """Number of devices."""
        return self.data * self.fsdp * self.tensor

    @property
    def row_shards(self) -> int:
        """Number of shards of a batch's rows."""
        return self.data * self.fsdp


def slices_of(devices: Sequence[jax.Device]) -> int:
    """Number of TPU slices that the devices belong to; the network between slices is slower than within one."""
    return len({getattr(device, "slice_index", 0) for device in devices if device.platform == "tpu"} or {0})


def default_shape(devices: int, rows: int, slices: int = 1) -> MeshShape:
    """The default mesh: as many devices as can split the rows equally, in fsdp groups of up to 16.

    Args:
        devices: number of devices.
        rows: rows of a microbatch.
        slices: number of TPU slices; an fsdp group stays within one.
    """
    used = math.gcd(devices, rows)
    inside = used // slices if used % slices == 0 else used
    fsdp = max(n for n in range(1, min(inside, 16) + 1) if inside % n == 0)
    return MeshShape(used // fsdp, fsdp)


def check_shape(
    shape: MeshShape,
    *,
    devices: int,
    rows: int,
    heads: int,
    kv_heads: int,
    length: int = 0,
    split_sequence: bool = False,
) -> None:
    """Check that a mesh can split a model and its batches.

    Args:
        shape: of the mesh.
        devices: number of devices available.
        rows: rows of a microbatch.
        heads: attention heads of the model.
        kv_heads: key/value heads of the model.
        length: tokens per row.
        split_sequence: whether positions of the residual stream are split over `tensor`.

    Raises:
        ValueError: too few devices, or a size that the mesh does not divide; the message gives the nearest one that it
            does.
    """
    if shape.size > devices:
        raise ValueError(f"mesh {shape} needs {shape.size} devices; there are {devices}")
    if rows % shape.row_shards:
        below, above = rows - rows % shape.row_shards, rows + -rows % shape.row_shards
        near = " or ".join(str(n) for n in (below, above) if n)
        raise ValueError(
            f"mesh {shape}: {rows} rows (of a microbatch) cannot be split over data x fsdp = {shape.row_shards}; "
            f"{near} rows can, or data x fsdp = {math.gcd(rows, shape.row_shards)}"
        )
    for name, count in (("heads", heads), ("key/value heads", kv_heads)):
        if count % shape.tensor:
            nearest = max(n for n in range(1, shape.tensor) if math.gcd(heads, kv_heads) % n == 0)
            raise ValueError(
                f"mesh {shape}: {count} {name} cannot be split over tensor = {shape.tensor}; "
                f"tensor = {nearest} is the nearest that can"
            )
    if split_sequence and length % shape.tensor:
        raise ValueError(
            f"mesh {shape}: rows of {length} tokens cannot be split over tensor = {shape.tensor}; "
            f"rows of {length + -length % shape.tensor} can"
        )


def make_mesh(shape: MeshShape, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Make a mesh with the axes data, fsdp and tensor, laid out so that neighbours in the mesh are near in the network.

    Over several TPU slices `data` is the outermost axis, so that only gradients cross the slower network.

    Args:
        shape: sizes of the axes.
        devices: by default `jax.devices()`; to compile ahead of time, the devices of a topology.

    Raises:
        ValueError: there are fewer devices than the mesh needs; or, over several slices, the mesh does not use all of
            them, or `data` is not a multiple of the number of slices.
    """
    devices = jax.devices() if devices is None else devices
    if shape.size > len(devices):
        raise ValueError(f"mesh {shape} needs {shape.size} devices; there are {len(devices)}")
    sizes = (shape.data, shape.fsdp, shape.tensor)
    if (slices := slices_of(devices)) > 1:
        if shape.size < len(devices) or shape.data % slices:
            raise ValueError(
                f"mesh {shape}: the {len(devices)} devices are {slices} slices; the mesh must use all of them, with "
                f"data a multiple of {slices}, e.g. data {slices} x fsdp {len(devices) // slices}"
            )
        grid = mesh_utils.create_hybrid_device_mesh(
            (shape.data // slices, *sizes[1:]), (slices, 1, 1), list(devices), allow_split_physical_axes=True
        )
    elif shape.size < len(devices):
        grid = np.array(devices[: shape.size]).reshape(sizes)
    else:
        grid = mesh_utils.create_device_mesh(sizes, list(devices), allow_split_physical_axes=True)
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * 3)


def current_mesh() -> AbstractMesh | None:
    """The abstract mesh of the surrounding `jax.set_mesh`; None without one, or if it has a single device."""
    mesh = jax.sharding.get_abstract_mesh()
    return None if mesh.empty or mesh.size == 1 or mesh.axis_names != AXES else mesh


def current_platform() -> str:
    """cpu, gpu or tpu: the platform of the surrounding mesh, which may not be this process's; otherwise the default."""
    device = getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None)
    platform = jax.default_backend() if device is None else device.platform
    return "gpu" if platform in ("cuda", "rocm") else platform


def row_shards() -> int:
    """Number of shards of the rows on the surrounding mesh; 1 without one."""
    mesh = current_mesh()
    return 1 if mesh is None else mesh.shape["data"] * mesh.shape["fsdp"]


def spec_of(shape: Sequence[int], axes: Axes, mesh: Mesh | AbstractMesh) -> P:
    """The PartitionSpec of an array with these logical axes, by RULES."""

    def split(size: int, axis: str | None) -> tuple[str, ...] | None:
        names = RULES.get(axis or "", ())
        return names if names and size % math.prod(mesh.shape[name] for name in names) == 0 else None

    assert len(shape) == len(axes), (shape, axes)
    return P(*(split(size, axis) for size, axis in zip(shape, axes, strict=True)))


def constrain(x: Array, *axes: str | None) -> Array:
    """Constrain the sharding of x by a logical axis for each dimension; without a mesh, return x itself."""
    mesh = current_mesh()
    return x if mesh is None else jax.lax.with_sharding_constraint(x, spec_of(x.shape, axes, mesh))


def base_sharding(path: str, shape: Sequence[int], mesh: Mesh) -> NamedSharding:
    """The sharding of the base tree's leaf at a path such as "blocks/attn/q/kernel"."""
    names = path.split("/")
    axes: Axes = BASE_AXES.get(names[-1]) or BASE_AXES.get("/".join(names[-2:])) or ()
    return NamedSharding(mesh, spec_of(shape, (None,) * (len(shape) - len(axes)) + axes, mesh))


def base_shardings(base: PyTree, mesh: Mesh) -> PyTree:
    """The sharding of every leaf (array or shape) of a base tree."""
    path_of = lambda path: jax.tree_util.keystr(path, simple=True, separator="/")
    return jax.tree_util.tree_map_with_path(lambda path, leaf: base_sharding(path_of(path), leaf.shape, mesh), base)


def steering_shardings(specs: Mapping[str, Mapping[str, Mapping[str, ParamSpec]]], mesh: Mesh) -> PyTree:
    """The sharding of every leaf of a steering tree, from `jaxsteer.steering.param_specs`."""
    return {
        slot: {
            site: {
                name: NamedSharding(mesh, P(None, *spec_of(spec.shape, spec.axes, mesh)))
                for name, spec in params.items()
            }
            for site, params in sites.items()
        }
        for slot, sites in specs.items()
    }


def optimizer_shardings(
    tx: optax.GradientTransformation, state: optax.OptState, params: PyTree, shardings: PyTree, mesh: Mesh
) -> PyTree:
    """Shardings of an optimizer's state: moments like their parameters, everything else (counts) replicated.

    Args:
        tx: the optimizer.
        state: its state, arrays or shapes.
        params: the parameters that it was initialised with, arrays or shapes.
        shardings: of `params`, with the same structure.
        mesh: the mesh.
    """
    everywhere = NamedSharding(mesh, P())
    masked = lambda leaf: isinstance(leaf, optax.MaskedNode)  # a parameter of another `optax.partition` group

    def place(leaf: Any, param: Any, at: NamedSharding) -> Any:
        if masked(leaf):
            return leaf
        return at if leaf.shape == param.shape else everywhere

    # Traced, so that nothing is computed: the mesh may be one of devices that are not here.
    init = lambda placeholders: jax.eval_shape(tx.init, placeholders)
    return optax.tree.map_params(
        init, place, state, params, shardings, transform_non_params=lambda _: everywhere, is_leaf=masked
    )


def batch_sharding(shape: Sequence[int], mesh: Mesh) -> NamedSharding:
    """The sharding of a batch's field [B, T], or [M, B, T] with M microbatches: rows over data and fsdp."""
    return NamedSharding(mesh, spec_of(shape, (None,) * (len(shape) - 2) + ("rows", None), mesh))


def batch_shardings(batch: Batch, mesh: Mesh) -> Batch:
    """The sharding of every field of a batch."""
    return jax.tree.map(lambda field: batch_sharding(field.shape, mesh), batch)
