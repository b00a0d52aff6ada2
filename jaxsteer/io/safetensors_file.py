"""The safetensors format: a checked header; tensors are read and written one at a time.

Layout (huggingface/safetensors): the header's length as u64, the header as JSON
{name: {dtype, shape, data_offsets}, "__metadata__": {str: str}}, then the tensors' bytes without gaps.

The `safetensors` package is not used: it writes from a dict of arrays that are all in memory, and its errors about a
damaged file do not name the tensor.
"""

from __future__ import annotations

import errno
import json
import os
import reprlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import ml_dtypes
import numpy as np

from jaxsteer.io.files import Json, parse_json, replacing
from jaxsteer.io.stored import Index, Read, Stored, read_part, size

DTYPES: dict[str, np.dtype] = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "I64": np.dtype("<i8"),
    "I32": np.dtype("<i4"),
    "I16": np.dtype("<i2"),
    "I8": np.dtype("i1"),
    "U64": np.dtype("<u8"),
    "U32": np.dtype("<u4"),
    "U16": np.dtype("<u2"),
    "U8": np.dtype("u1"),
    "BOOL": np.dtype("?"),
}
FLOATS = ("F64", "F32", "F16", "BF16")
HEADER_LIMIT = 100_000_000  # bytes; set by the format
AXES_LIMIT = 8


class ToWrite(NamedTuple):
    """A tensor to write; `read` returns its value, of this shape and dtype, and is called just before it is written."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[], np.ndarray]

    @classmethod
    def of(cls, name: str, value: np.ndarray) -> ToWrite:
        """A tensor that is an array already; it is made contiguous when it is written."""
        return cls(name, value.shape, value.dtype, lambda: np.ascontiguousarray(value))


def open_safetensors(path: Path) -> tuple[dict[str, Stored], dict[str, str]]:
    """Read the header of a safetensors file.

    Returns:
        The tensors by name, each read only when its `read` is called, and the file's metadata.

    Raises:
        ValueError: the file is truncated or malformed; reading a tensor whose dtype is not a float type.
    """
    try:
        file_size = os.path.getsize(path)
        with open(path, "rb") as file:
            header_size = int.from_bytes(file.read(8), "little")
            if file_size < 8 or header_size > min(file_size - 8, HEADER_LIMIT):
                raise ValueError(f"the header would end at byte {8 + header_size} of {file_size}")
            # Of two entries for one tensor neither can be trusted.
            header = parse_json(file.read(header_size), "the header", unique_keys=True)
        return _parse(path, header, 8 + header_size, file_size)
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file") from None
    except IsADirectoryError:
        raise ValueError(f"{path}: is a folder, expected a file") from None
    except OSError as error:
        if error.errno != errno.ENAMETOOLONG:  # as an index may have it
            raise
        raise ValueError(f"{path.parent}: no file has a name of {len(path.name)} letters") from None
    except ValueError as error:
        raise ValueError(
            f"{path}: not a complete safetensors file ({error}). Was the download or the copy cut short?"
        ) from None


def _parse(path: Path, header: Json, start: int, file_size: int) -> tuple[dict[str, Stored], dict[str, str]]:
    """The tensors and the metadata of a header; the tensors' bytes begin at `start`."""
    if not isinstance(header, dict):
        raise ValueError("the header is not a JSON object")
    metadata = header.pop("__metadata__", None) or {}
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError("__metadata__ holds something other than text")
    spans, stored = [], {}
    for name, entry in header.items():
        code, shape, begin, end = _entry(name, entry)
        if end - begin != size(shape) * DTYPES[code].itemsize:
            raise ValueError(f"{name!r} of shape {list(shape)} and type {code} cannot take {end - begin} bytes")
        spans.append((begin, end, name))
        stored[name] = Stored(shape, end - begin, _reader(path, name, code, shape, start + begin), code)
    at = 0
    for begin, end, name in sorted(spans):
        if begin != at:
            raise ValueError(f"{name!r} begins at byte {begin} of the data, expected {at}")
        at = end
    if start + at != file_size:
        raise ValueError(f"the tensors end at byte {start + at}, the file at {file_size}")
    return stored, metadata


def _entry(name: str, entry: Json) -> tuple[str, tuple[int, ...], int, int]:
    """A tensor's dtype code, shape, and where its bytes begin and end within the data, checked."""
    fields = ("dtype", "shape", "data_offsets")
    if not isinstance(entry, dict) or any(field not in entry for field in fields):
        raise ValueError(f"{name!r} is {reprlib.repr(entry)}; expected an object with {', '.join(fields)}")
    code, shape, offsets = (entry[field] for field in fields)
    if not isinstance(code, str) or code not in DTYPES:
        raise ValueError(f"{name!r} has the unknown type {reprlib.repr(code)}")
    numbers = all(isinstance(part, list) and all(type(n) is int and n >= 0 for n in part) for part in (shape, offsets))
    if not numbers or len(shape) > AXES_LIMIT or len(offsets) != 2:
        raise ValueError(f"{name!r} has shape {reprlib.repr(shape)} and data_offsets {reprlib.repr(offsets)}")
    return code, tuple(shape), *offsets


def _reader(path: Path, name: str, code: str, shape: tuple[int, ...], offset: int) -> Read:
    """The `read` of a tensor that begins at byte `offset`."""

    def read(index: Index = ()) -> np.ndarray:
        if code not in FLOATS:
            raise ValueError(
                f"{path}: {name} is stored as {code}, whose scales this loader does not know; supported are "
                f"{', '.join(FLOATS)}. Use an unquantised copy of the model, or its GGUF file"
            )
        return read_part(path, name, DTYPES[code], offset, shape, index)

    return read


def write_safetensors(path: Path, tensors: Iterable[ToWrite], metadata: dict[str, str]) -> None:
    """Write a safetensors file atomically.

    Raises:
        ValueError: a dtype that the format does not have.
    """
    codes = {dtype: code for code, dtype in DTYPES.items()}
    # Wide types first, so that every tensor is aligned to its item size.
    order = sorted(tensors, key=lambda tensor: (-tensor.dtype.itemsize, tensor.name))
    header: dict[str, Json] = {"__metadata__": metadata}
    at = 0
    for name, shape, dtype, _ in order:
        if dtype not in codes:
            raise ValueError(f"{path}: {name} has dtype {dtype}, which safetensors does not have")
        end = at + size(shape) * dtype.itemsize
        header[name] = {"dtype": codes[dtype], "shape": list(shape), "data_offsets": [at, end]}
        at = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with replacing(path) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, shape, dtype, read in order:
            value = np.ascontiguousarray(read())
            assert value.shape == shape, (name, value.shape, shape)
            assert value.dtype == dtype, (name, value.dtype, dtype)
            file.write(value.reshape(-1).view(np.uint8).data)
