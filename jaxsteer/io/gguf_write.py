"""Writing GGUF files: typed key/value pairs, and tensors that are computed and encoded one at a time."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from jaxsteer.io.files import replacing
from jaxsteer.io.gguf_file import Gguf, GgufValue
from jaxsteer.io.safetensors_file import ToWrite
from jaxsteer.io.stored import PIECE, Index, Stored, size

if TYPE_CHECKING:
    from gguf import GGUFWriter

KINDS = ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1")
"""Types of matrices that can be written."""

FILE_TYPES = {"F32": 0, "F16": 1, "Q4_0": 2, "Q4_1": 3, "Q8_0": 7, "Q5_0": 8, "Q5_1": 9, "BF16": 32}
"""`general.file_type` of files whose matrices have this type, for display."""

ALWAYS_F32 = ("position_embd.weight",)
"""Matrices that llama.cpp keeps in fp32."""


class Encoded(NamedTuple):
    """A tensor to write, and the ggml type in which it is stored."""

    tensor: ToWrite
    kind: str

    @property
    def nbytes(self) -> int:
        """Bytes that it takes in the file."""
        block, width = _block_of(self.kind)
        return size(self.tensor.shape) // block * width


def plain(name: str, values: np.ndarray) -> Encoded:
    """An fp32 array to write as it is."""
    return Encoded(ToWrite(name, values.shape, values.dtype, lambda: values), "F32")


def encoded(tensor: ToWrite, kind: str) -> Encoded:
    """A tensor in the type that llama.cpp's converter gives it in a file whose matrices have type `kind`.

    Vectors stay fp32; so do matrices in ALWAYS_F32. Rows that are not made of whole blocks become F16.
    """
    if len(tensor.shape) < 2 or tensor.name in ALWAYS_F32:
        return Encoded(tensor, "F32")
    return Encoded(tensor, "F16" if tensor.shape[-1] % _block_of(kind)[0] else kind)


def in_memory(path: Path, metadata: Mapping[str, GgufValue], tensors: Iterable[Encoded]) -> Gguf:
    """The file that `write_gguf` would write, as `open_gguf` would open it; tensors are encoded when they are read.

    Raises:
        ValueError: on reading a tensor, values that its type cannot hold.
    """
    tensors = list(tensors)
    # Readers take a tensor in pieces, one tensor after the other.
    values = lru_cache(maxsize=1)(lambda i: tensors[i].tensor.read())

    def stored(i: int, item: Encoded) -> Stored:
        def read(index: Index = ()) -> np.ndarray:
            return _decoded(values(i)[index], item, path)

        return Stored(item.tensor.shape, item.nbytes, read, item.kind)

    return Gguf(path, dict(metadata), {item.tensor.name: stored(i, item) for i, item in enumerate(tensors)})


def write_gguf(path: Path, metadata: Mapping[str, GgufValue], tensors: Iterable[Encoded]) -> None:
    """Write a GGUF file atomically.

    Args:
        path: the file.
        metadata: its key/value pairs, with general.architecture. Whole numbers are stored as u32, or as i32 in lists;
            floats as f32. Empty lists, which the format has no type for, are left out.
        tensors: each is computed, encoded and written before the next.

    Raises:
        ValueError: a number that the file cannot hold.
    """
    from gguf import GGMLQuantizationType, GGUFWriter

    tensors = list(tensors)
    with replacing(path) as file:
        writer = GGUFWriter(file.name, str(metadata["general.architecture"]))
        try:
            for key, value in metadata.items():
                if key != "general.architecture" and value != []:
                    _add(writer, key, value, path)
            for item in tensors:
                name, shape = item.tensor.name, item.tensor.shape
                writer.add_tensor_info(name, shape, np.dtype(np.float32), item.nbytes, GGMLQuantizationType[item.kind])
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            for item in tensors:
                writer.write_tensor_data(_encode(item.tensor.read(), item.kind))
        finally:
            writer.close()


def _add(writer: GGUFWriter, key: str, value: GgufValue, path: Path) -> None:
    """Add a key/value pair with the type that llama.cpp's converter gives it."""
    from gguf import GGUFValueType

    if isinstance(value, list):
        texts = [item.encode("utf-8", "surrogateescape") if isinstance(item, str) else item for item in value]
        writer.add_key_value(key, texts, GGUFValueType.ARRAY)
    elif isinstance(value, str):
        writer.add_key_value(key, value.encode("utf-8", "surrogateescape"), GGUFValueType.STRING)
    elif isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif 0 <= value < 1 << 32:
        writer.add_uint32(key, value)
    else:
        raise ValueError(f"{path}: {key} is {value}; this key holds whole numbers from 0 to 4,294,967,295")


def _encode(values: np.ndarray, kind: str) -> np.ndarray:
    """A tensor's bytes, encoded in pieces: the encoders need several times the memory of what they are given."""
    from gguf import GGMLQuantizationType
    from gguf.quants import quantize

    rows = values.reshape(-1, values.shape[-1]) if values.ndim else values
    step = max(1, PIECE // max(values.shape[-1], 1))
    target = GGMLQuantizationType[kind]
    with np.errstate(over="ignore", invalid="ignore"):
        pieces = [
            quantize(np.ascontiguousarray(rows[at : at + step], np.float32), target) for at in range(0, len(rows), step)
        ]
    return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)


def _decoded(values: np.ndarray, item: Encoded, path: Path) -> np.ndarray:
    """What a reader finds of these values, fp32."""
    from gguf import GGMLQuantizationType
    from gguf.quants import dequantize

    with np.errstate(all="ignore"):
        found = dequantize(_encode(values, item.kind), GGMLQuantizationType[item.kind]).reshape(values.shape)
    if item.kind != "F32" and not np.isfinite(found[np.isfinite(np.asarray(values, np.float32))]).all():
        raise ValueError(f"{path}: {item.tensor.name} has values that {item.kind} cannot hold; write F32 or BF16")
    return found


def _block_of(kind: str) -> tuple[int, int]:
    """Values in a block of this type, and its bytes."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    return GGML_QUANT_SIZES[GGMLQuantizationType[kind]]
