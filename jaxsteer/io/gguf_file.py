"""The GGUF format: a checked header; tensors are dequantised one at a time.

Layout (ggml, docs/gguf.md): magic, version, counts, typed key/value pairs, tensor infos, padding, tensor data. The
header is parsed here rather than by `gguf.GGUFReader`, which trusts counts and lengths (a corrupt file can exhaust the
memory) and takes seconds on a large vocabulary; the `gguf` package dequantises the blocks.
"""

from __future__ import annotations

import mmap
import reprlib
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

import numpy as np

from jaxsteer.io.stored import Index, Read, Stored, all_of, read_part, size

if TYPE_CHECKING:
    from gguf.constants import GGMLQuantizationType

GgufValue: TypeAlias = "bool | int | float | str | list[GgufValue]"
"""A value of a GGUF file's metadata."""

SCALARS = {
    0: "<B",
    1: "<b",
    2: "<H",
    3: "<h",
    4: "<I",
    5: "<i",
    6: "<f",
    7: "<?",
    10: "<Q",
    11: "<q",
    12: "<d",
}
STRING, ARRAY = 8, 9
PLAIN: dict[str, np.dtype] = {"F16": np.dtype("<f2"), "F32": np.dtype("<f4"), "F64": np.dtype("<f8")}
EXACT = (*PLAIN, "BF16", "Q8_0")
"""Types whose rounding an importance matrix does not change."""
VERSIONS = (2, 3)
AXES_LIMIT = 4
HEADER_LIMIT = (
    1 << 26
)  # bytes; a vocabulary of 262,144 takes 6 million. Parsing allocates a few times the header's size


@dataclass(frozen=True)
class Gguf:
    """An opened GGUF file: its key/value pairs and its tensors."""

    path: Path
    metadata: dict[str, GgufValue]
    tensors: dict[str, Stored]


class _Cursor:
    """Reads forward through bytes; every length is compared with what is left before anything is allocated."""

    def __init__(self, data: mmap.mmap) -> None:
        self.data, self.at = data, 0
        self.end = min(len(data), HEADER_LIMIT)

    def take(self, count: int) -> bytes:
        if count > self.end - self.at:
            raise ValueError(f"{count} bytes expected at byte {self.at} of {self.end}")
        self.at += count
        return self.data[self.at - count : self.at]

    def scalar(self, form: str) -> bool | int | float:
        return struct.unpack(form, self.take(struct.calcsize(form)))[0]

    def integer(self, form: str) -> int:
        return int(self.scalar(form))

    def text(self) -> str:
        # Vocabularies may hold parts of UTF-8 characters, whose bytes must be preserved.
        return self.take(self.integer("<Q")).decode("utf-8", "surrogateescape")

    def name(self) -> str:
        try:
            return self.take(self.integer("<Q")).decode()
        except UnicodeDecodeError:
            raise ValueError(f"the name that ends at byte {self.at} is not UTF-8") from None

    def value(self, kind: int, depth: int = 0) -> GgufValue:
        if kind in SCALARS:
            return self.scalar(SCALARS[kind])
        if kind == STRING:
            return self.text()
        if kind != ARRAY or depth > 4:
            raise ValueError(f"value type {kind} at byte {self.at}")
        inner, count = self.integer("<I"), self.integer("<Q")
        if inner in SCALARS:
            form = np.dtype(SCALARS[inner])
            return np.frombuffer(self.take(count * form.itemsize), form).tolist()
        if count * 8 > self.end - self.at:  # a string or an array takes at least its length
            raise ValueError(f"{count} values expected at byte {self.at} of {self.end}")
        return [self.value(inner, depth + 1) for _ in range(count)]


def open_gguf(path: Path) -> Gguf:
    """Read the header of a GGUF file.

    Raises:
        ValueError: the file is truncated, malformed, big-endian or of an unknown version or tensor type.
    """
    try:
        with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _parse(path, _Cursor(data))
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file") from None
    except IsADirectoryError:
        raise ValueError(f"{path}: is a folder, expected a file") from None
    except ValueError as error:
        raise ValueError(
            f"{path}: not a complete GGUF file ({error}). Was the download or the copy cut short?"
        ) from None


def _parse(path: Path, cursor: _Cursor) -> Gguf:
    """Parse the whole header, and check that the tensors fill the file in order."""
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

    if cursor.take(4) != b"GGUF":
        raise ValueError("it does not begin with GGUF")
    version = cursor.integer("<I")
    if version not in VERSIONS:
        raise ValueError(f"version {version}; supported are {VERSIONS}, little-endian")
    tensor_count, pair_count = cursor.integer("<Q"), cursor.integer("<Q")
    metadata: dict[str, GgufValue] = {}
    for _ in range(pair_count):
        key = cursor.name()
        if key in metadata:
            raise ValueError(f"{key!r} is given twice")
        with _context(f"the value of {key!r}"):
            metadata[key] = cursor.value(cursor.integer("<I"))

    infos: dict[str, tuple[tuple[int, ...], GGMLQuantizationType, int]] = {}
    for _ in range(tensor_count):
        name = cursor.name()
        with _context(f"tensor {name!r}"):
            dims = cursor.integer("<I")
            if name in infos or dims > AXES_LIMIT:
                raise ValueError(f"it has {dims} axes, or is given twice")
            shape = tuple(cursor.integer("<Q") for _ in range(dims))[::-1]
            code, offset = cursor.integer("<I"), cursor.integer("<Q")
            if code not in GGML_QUANT_SIZES:
                raise ValueError(f"it has type {code}, which the installed gguf package does not know")
            infos[name] = shape, GGMLQuantizationType(code), offset

    alignment = metadata.get("general.alignment", 32)
    if type(alignment) is not int or alignment < 1 or alignment & (alignment - 1):
        raise ValueError(f"general.alignment is {reprlib.repr(alignment)}; expected a power of two")
    start = at = -(-cursor.at // alignment) * alignment
    fitted = any(key.startswith("quantize.imatrix.") for key in metadata)
    tensors = {}
    for name, (shape, kind, offset) in infos.items():
        block, width = GGML_QUANT_SIZES[kind]
        if not shape or 0 in shape or shape[-1] % block:
            raise ValueError(f"tensor {name!r} of shape {list(shape)} is not made of {kind.name} blocks of {block}")
        nbytes = size(shape) // block * width
        if start + offset != at:
            raise ValueError(f"tensor {name!r} begins at byte {start + offset}, expected {at}")
        if at + nbytes > len(cursor.data):
            raise ValueError(f"tensor {name!r} would end at byte {at + nbytes} of {len(cursor.data)}")
        form = f"{kind.name} (imatrix)" if fitted and kind.name not in EXACT else kind.name
        tensors[name] = Stored(shape, nbytes, _reader(path, name, shape, kind, at), form)
        at += -(-nbytes // alignment) * alignment
    return Gguf(path, metadata, tensors)


@contextmanager
def _context(what: str) -> Iterator[None]:
    """Prefix the message of a ValueError with what was being read."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{what}: {error}") from None


def _reader(path: Path, name: str, shape: tuple[int, ...], kind: GGMLQuantizationType, offset: int) -> Read:
    """The `read` of a tensor that begins at byte `offset`."""
    from gguf.constants import GGML_QUANT_SIZES
    from gguf.quants import dequantize

    block, width = GGML_QUANT_SIZES[kind]

    def read(index: Index = ()) -> np.ndarray:
        if kind.name in PLAIN:
            return read_part(path, name, PLAIN[kind.name], offset, shape, index)
        *rows, last = index or all_of(shape)
        first = last.start // block  # blocks run along the last axis
        blocks = slice(first * width, -(-last.stop // block) * width)
        stored = (*shape[:-1], shape[-1] // block * width)
        raw = read_part(path, name, np.dtype(np.uint8), offset, stored, (*rows, blocks))
        try:
            values = np.asarray(dequantize(raw, kind), np.float32)
        except NotImplementedError:
            raise ValueError(
                f"{path}: {name} has type {kind.name}, which the gguf package cannot dequantise; use a "
                "file with another quantisation"
            ) from None
        return values[..., last.start - first * block : last.stop - first * block]

    return read
