"""The safetensors format: a checked header, tensors read and written one at a time.

Layout (huggingface/safetensors): u64 length of the header, the header as JSON
{name: {dtype, shape, data_offsets}, "__metadata__": {str: str}}, then the bytes without gaps. The package of
that
name is not used: its numpy interface knows no bfloat16 in older versions and writes only from whole trees.
"""

from __future__ import annotations

import json
import os
import reprlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from jaxsteer.io.files import replacing
from jaxsteer.io.stored import Index, Read, Stored, read_part, size

DTYPES: dict[str, Any] = {
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
HEADER_LIMIT = 100_000_000  # the format's own
AXES_LIMIT = 8


class ToWrite(NamedTuple):
    """A tensor to be written; `read` is called when its turn comes."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[], np.ndarray]


def open_safetensors(path: Path) -> tuple[dict[str, Stored], dict[str, str]]:
    """Read the header of a safetensors file.

    Returns:
        The tensors by name, each read when asked for, and the file's own metadata.

    Raises:
        ValueError: the file is truncated or malformed; reading a tensor that is not of a float type.
    """
    try:
        length = os.path.getsize(path)
        with open(path, "rb") as file:
            head = int.from_bytes(file.read(8), "little")
            if length < 8 or head > min(length - 8, HEADER_LIMIT):
                raise ValueError(f"the header would end at byte {8 + head} of {length}")
            header = json.loads(file.read(head), object_pairs_hook=_once)
        return _parse(path, header, 8 + head, length)
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"{path}: not a complete safetensors file ({error}). Was the download or the copy cut short?"
        ) from None


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object that names nothing twice: of two entries for a tensor neither can be believed."""
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"{name!r} is given twice")
        found[name] = value
    return found


def _parse(path: Path, header: Any, start: int, length: int) -> tuple[dict[str, Stored], dict[str, str]]:
    if not isinstance(header, dict):
        raise ValueError("the header is no JSON object")
    metadata = header.pop("__metadata__", None) or {}
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError("__metadata__ holds something other than text")
    spans, stored = [], {}
    for name, entry in header.items():
        code, shape, begin, end = _entry(name, entry)
        if end - begin != size(shape) * DTYPES[code].itemsize:
            raise ValueError(f"{name!r} of shape {list(shape)} and type {code} cannot take {end - begin} bytes")
        spans.append((begin, end, name))
        stored[name] = Stored(shape, end - begin, _reader(path, name, code, shape, start + begin))
    at = 0
    for begin, end, name in sorted(spans):
        if begin != at:
            raise ValueError(f"{name!r} begins at byte {begin} of the data, where {at} was due")
        at = end
    if start + at != length:
        raise ValueError(f"the tensors end at byte {start + at}, the file at {length}")
    return stored, metadata


def _entry(name: str, entry: Any) -> tuple[str, tuple[int, ...], int, int]:
    """Type, shape, begin and end of a tensor, as the header says them."""
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
    def read(index: Index = ()) -> np.ndarray:
        if code not in FLOATS:
            raise ValueError(
                f"{path}: {name} is stored as {code}, which needs scales from elsewhere; supported are "
                f"{', '.join(FLOATS)}. Use an unquantised copy of the model, or its GGUF"
            )
        return read_part(path, name, DTYPES[code], offset, shape, index)

    return read


def write_safetensors(path: Path, tensors: Iterable[ToWrite], metadata: dict[str, str]) -> None:
    """Write a safetensors file: under a temporary name in the same folder, then renamed.

    Raises:
        ValueError: a dtype that the format does not have.
    """
    codes = {dtype: code for code, dtype in DTYPES.items()}
    # Wide types first, so that every tensor is aligned to its own width.
    order = sorted(tensors, key=lambda tensor: (-tensor.dtype.itemsize, tensor.name))
    header: dict[str, Any] = {"__metadata__": metadata}
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
