"""From named tensors in files to the base tree: one checked read for every format, of what each device holds."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from jaxsteer.models.config import ModelConfig
from jaxsteer.models.families.table import Family, Row, Transform
from jaxsteer.models.quantise import quantise_kernel
from jaxsteer.types import Array, PyTree

Progress = Callable[[int, int], None]
"""(bytes read so far, bytes in all)"""

Place = Callable[[str, tuple[int, ...]], jax.sharding.Sharding]
"""(path in the base tree, shape of the stacked leaf) -> its sharding."""

Index = tuple[slice, ...]
"""Part of a tensor: a slice with start and stop for every axis; () means all of it."""

MISSING_LIMIT = 1000
"""Missing tensors after which no more are looked for."""

PIECE = 1 << 23
"""Elements of a tensor that are read at a time."""


class Read(Protocol):
    """Reads part of a tensor into memory, as a float array."""

    def __call__(self, index: Index = ()) -> np.ndarray: ...  # noqa: D102


@dataclass(frozen=True)
class Stored:
    """A tensor in a file, of which all or a part can be read. `shape` is in numpy's order (slowest axis first).

    `form` names how its values are stored: "F32", "BF16", "Q8_0", ...
    """

    shape: tuple[int, ...]
    nbytes: int
    read: Read
    form: str = ""

    def nbytes_of(self, index: Index) -> int:
        """Bytes that a part takes in the file, about."""
        return self.nbytes * size_of(index) // max(size(self.shape), 1)


@dataclass(frozen=True)
class ReadOptions:
    """How weights are read.

    dtype      of the result; values are rounded to nearest
    progress   called after every tensor or part of one, with the bytes that this process reads
    place      sharding of each leaf; None = all leaves on the default device
    quantised  quantise each projection to int8 on its devices before the next is read
    """

    dtype: DTypeLike = jnp.float32
    progress: Progress | None = None
    place: Place | None = None
    quantised: bool = False


DEFAULT_OPTIONS = ReadOptions()


def read_base(
    stored: Mapping[str, Stored],
    layout: str,
    family: Family,
    config: ModelConfig,
    where: str,
    options: ReadOptions = DEFAULT_OPTIONS,
) -> PyTree:
    """Read a base tree, shard by shard.

    A shard is read once, however many devices of this process hold it; shards of other processes are not read. Besides
    the result, the host holds one shard, the copy its transfer needs, and pieces of PIECE elements.

    Args:
        stored: the tensors of the file or files, by their published names.
        layout: the naming scheme of `stored`, "hf" or "gguf".
        family: the family whose table maps names to leaves.
        config: the model's features.
        where: the file or folder, for messages.
        options: dtype and placement of the result.

    Raises:
        ValueError: tensors that are missing, unknown or of the wrong shape, all named in one message.
    """
    rows = family.parameters(config)
    stored = with_prefix(stored, layout, family)
    check_names(stored, layout, family, config, where)
    leaves = []
    for row in rows:
        tensors = _tensors(stored, row, layout, config)
        leaves.append(_Leaf(row, tensors, transform_of(row, layout), config, options.place))
    total = sum(leaf.nbytes for leaf in leaves)
    done = 0

    def count(nbytes: int) -> None:
        nonlocal done
        done += nbytes
        if options.progress is not None:
            options.progress(done, total)

    base: dict[str, PyTree] = {}
    for leaf in leaves:
        array = leaf.load(jnp.dtype(options.dtype), count)
        if options.quantised and leaf.row.path.endswith("/kernel"):
            array, scale = quantise_kernel(array)
            _put(base, leaf.row.path.replace("/kernel", "/scale"), scale)
        _put(base, leaf.row.path, array)
    return base


Spans = tuple[tuple[int, int], ...]
"""Start and stop for every axis: a hashable Index."""


class _Leaf:
    """A leaf of the base tree to read: its tensors, and which devices of this process hold which shard."""

    def __init__(
        self, row: Row, tensors: list[Stored], transform: Transform, config: ModelConfig, place: Place | None
    ) -> None:
        self.row, self.tensors, self.transform, self.config = row, tensors, transform, config
        shape = row.shape(config)
        self.shape = (config.layers, *shape) if row.stacked else shape
        self.sharding = None if place is None else place(row.path, self.shape)
        self.shards: dict[Spans, list[jax.Device | None]] = {}
        if self.sharding is None:
            self.shards[tuple((0, length) for length in self.shape)] = [None]
            return
        for device, index in self.sharding.addressable_devices_indices_map(self.shape).items():
            spans = tuple(part.indices(length)[:2] for part, length in zip(index or (), self.shape, strict=True))
            self.shards.setdefault(spans, []).append(device)

    @property
    def nbytes(self) -> int:
        """Bytes that are read from files for it."""
        return sum(
            tensor.nbytes_of(_stored_index(tensor, self.transform, index, self.config))
            for spans in self.shards
            for tensor, index in self._parts(spans)
        )

    def load(self, dtype: np.dtype, count: Callable[[int], None]) -> jax.Array:
        """Read the shards and send each to its devices; `count` is called with the bytes of each part."""

        def send(spans: Spans, devices: list[jax.Device | None]) -> list[jax.Array]:
            shard = self._read(spans, dtype, count)
            return jax.block_until_ready([jax.device_put(shard, device) for device in devices])

        sent = [array for spans, devices in self.shards.items() for array in send(spans, devices)]
        if self.sharding is None:
            return sent[0]
        return jax.make_array_from_single_device_arrays(self.shape, self.sharding, sent)

    def _parts(self, spans: Spans) -> list[tuple[Stored, Index]]:
        """The stored tensors of a shard, one per layer, each with the part of our leaf (for that layer) it fills."""
        layers, rest = (range(*spans[0]), spans[1:]) if self.row.stacked else (range(1), spans)
        return [(self.tensors[i], tuple(slice(*span) for span in rest)) for i in layers]

    def _read(self, spans: Spans, dtype: np.dtype, count: Callable[[int], None]) -> np.ndarray:
        """A shard, in the file's memory order: the transfer to a device transposes much faster than numpy."""
        shape = [stop - start for start, stop in spans]
        if self.transform.flips and len(self.row.axes) == 2:
            shard = np.empty((*shape[:-2], shape[-1], shape[-2]), dtype).swapaxes(-1, -2)
        else:
            shard = np.empty(shape, dtype)
        for out, (tensor, index) in zip(shard if self.row.stacked else [shard], self._parts(spans), strict=True):
            _fill(out, tensor, self.transform, index, self.config)
            count(tensor.nbytes_of(_stored_index(tensor, self.transform, index, self.config)))
        return shard


def _stored_index(tensor: Stored, transform: Transform, index: Index, config: ModelConfig) -> Index:
    """The part of a stored tensor that is needed for the part `index` of our leaf."""
    if transform.group is None:
        return all_of(tensor.shape)
    rows, *rest = index[::-1] if transform.flips else index
    group = transform.group(config)
    return (slice(rows.start // group * group, -(-rows.stop // group) * group), *rest)


def _fill(out: np.ndarray, tensor: Stored, transform: Transform, index: Index, config: ModelConfig) -> None:
    """Read the part `index` of our leaf (for one layer) into `out`, a piece of the stored rows at a time."""
    if transform.group is None:
        out[...] = transform.read(tensor.read(), config)[index]
        return
    as_stored = lambda array: array.T if transform.flips else array
    wanted = (index[::-1] if transform.flips else index)[0]
    for piece in _pieces(tensor, _stored_index(tensor, transform, index, config), transform.group(config)):
        values, rows = as_stored(transform.read(tensor.read(piece), config)), piece[0]
        start, stop = max(rows.start, wanted.start), min(rows.stop, wanted.stop)
        as_stored(out)[start - wanted.start : stop - wanted.start] = values[start - rows.start : stop - rows.start]


def _pieces(tensor: Stored, index: Index, group: int = 1) -> Iterator[Index]:
    """Cut a part of a stored tensor into pieces of about PIECE elements, in whole groups of rows."""
    rows, *rest = index
    step = group * max(1, PIECE // (group * size_of(rest) or 1))
    for begin in range(rows.start, rows.stop, step):
        yield (slice(begin, min(begin + step, rows.stop)), *rest)


def size_of(index: Sequence[slice]) -> int:
    """Number of elements of a part."""
    return size(tuple(part.stop - part.start for part in index))


def all_of(shape: tuple[int, ...]) -> Index:
    """The index of the whole tensor."""
    return tuple(slice(0, length) for length in shape)


def _tensors(stored: Mapping[str, Stored], row: Row, layout: str, config: ModelConfig) -> list[Stored]:
    """The stored tensors of a parameter, one per layer or just one; a fused one is cut to this parameter's part."""
    tensors = [stored[name] for name in names_of(row, layout, config)]
    part = row.stored_outputs(config)
    if part is None:
        return tensors
    axis = transform_of(row, layout).outputs_axis(len(row.axes))
    return [_part_of(tensor, axis, *part[:2]) for tensor in tensors]


def _part_of(tensor: Stored, axis: int, start: int, stop: int) -> Stored:
    """The slice from start to stop along an axis, as a tensor of its own."""
    shape = (*tensor.shape[:axis], stop - start, *tensor.shape[axis + 1 :])

    def read(index: Index = ()) -> np.ndarray:
        spans = list(index or all_of(shape))
        spans[axis] = slice(spans[axis].start + start, spans[axis].stop + start)
        return tensor.read(tuple(spans))

    return Stored(shape, tensor.nbytes * (stop - start) // max(tensor.shape[axis], 1), read, tensor.form)


def with_prefix(stored: Mapping[str, Stored], layout: str, family: Family) -> Mapping[str, Stored]:
    """The tensors by their full names, where a file omits what all names of its family begin with."""
    if layout != "hf" or any(name.startswith(family.prefix) for name in stored):
        return stored
    return {family.prefix + name: tensor for name, tensor in stored.items()}


def read_part_of_leaf(
    stored: Mapping[str, Stored], row: Row, layout: str, config: ModelConfig, layer: int, index: Index
) -> tuple[np.ndarray, str]:
    """A part of one layer's leaf as `read_base` would read it, in fp32, and the form in which it is stored."""
    tensor = _tensors(stored, row, layout, config)[layer]
    out = np.empty([part.stop - part.start for part in index], np.float32)
    _fill(out, tensor, transform_of(row, layout), index, config)
    return out, tensor.form


def names_of(row: Row, layout: str, config: ModelConfig) -> list[str]:
    """The published names of a row's tensors: one per layer if it is stacked, else one."""
    name = getattr(row, layout)
    return [name.replace("{i}", str(i)) for i in range(config.layers)] if row.stacked else [name]


def transform_of(row: Row, layout: str) -> Transform:
    """The row's transform for this kind of file."""
    return row.gguf_transform or row.transform if layout == "gguf" else row.transform


def check_names(stored: Mapping[str, Stored], layout: str, family: Family, config: ModelConfig, where: str) -> None:
    """Compare names and shapes with the family's table.

    Raises:
        ValueError: names every tensor that is missing, unknown, or of another shape than expected.
    """
    missing, misshapen, expected = [], [], set()
    for row in family.parameters(config):
        change = transform_of(row, layout)
        shape = row.shape(config)[::-1] if change.flips else row.shape(config)
        if (part := row.stored_outputs(config)) is not None:
            axis = change.outputs_axis(len(shape))
            shape = (*shape[:axis], part[2], *shape[axis + 1 :])
        for i in range(config.layers if row.stacked else 1):
            name = getattr(row, layout).replace("{i}", str(i))
            if name in expected:  # fused with a parameter above
                continue
            expected.add(name)
            if name not in stored:
                missing.append(name)
            elif stored[name].shape != shape:
                misshapen.append(f"{name} has shape {list(stored[name].shape)}, expected {list(shape)}")
            if len(missing) > MISSING_LIMIT:  # a config that promises a billion layers
                break
    tied = {getattr(row, layout) for row in family.rows if row.unless == "tied_head"}
    surplus = [
        name
        for name in stored
        if name not in expected
        and not any(re.fullmatch(pattern, name) for pattern in family.harmless)
        and not (config.tied_head and name in tied and repeats_embedding(stored, name, layout, family))
    ]
    problems = [
        f"{title}: {', '.join(tensors)}"
        for title, tensors in (("missing", missing), ("unknown", surplus), ("misshapen", misshapen))
        if tensors
    ]
    if problems:
        raise ValueError(
            f"{where}: the tensors are not those of a {family.name} model with this config. "
            + "; ".join(problems)
            + ". Check that config and weights belong together"
        )


def repeats_embedding(stored: Mapping[str, Stored], name: str, layout: str, family: Family) -> bool:
    """Whether a head that is stored although it is tied is a copy of the embedding."""
    embedding = next(getattr(row, layout) for row in family.rows if row.path == "embed/embedding")
    if embedding not in stored or stored[embedding].shape != stored[name].shape:
        return False
    one, other = stored[embedding], stored[name]
    return all(np.array_equal(one.read(rows), other.read(rows)) for rows in _pieces(one, all_of(one.shape)))


def _put(tree: dict[str, PyTree], path: str, leaf: Array) -> None:
    """Set the leaf at a path, creating the dicts on the way."""
    *parents, last = path.split("/")
    for key in parents:
        tree = tree.setdefault(key, {})
    tree[last] = leaf


def read_part(path: Path, name: str, dtype: np.dtype, offset: int, shape: tuple[int, ...], index: Index) -> np.ndarray:
    """Read part of a tensor that is stored as a plain array.

    Args:
        path: the file.
        name: of the tensor, for the message.
        dtype: of its elements.
        offset: first byte of the tensor in the file.
        shape: of the whole tensor.
        index: the part to read.

    Raises:
        ValueError: the file is shorter than it was when its header was read.
    """
    if os.path.getsize(path) < offset + size(shape) * dtype.itemsize:
        raise ValueError(f"{path}: {name} ends early; the file changed while it was read")
    if 0 in shape:
        return np.empty(shape, dtype)
    # A copy, so that the mapping is closed and later changes of the file do not show.
    return np.array(np.memmap(path, dtype, "r", offset, shape)[index])


def size(shape: tuple[int, ...]) -> int:
    """Number of elements, in Python integers: the shape in a damaged header must not overflow."""
    return math.prod(shape)
