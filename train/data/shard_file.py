"""One file of tokenised examples: Arrow's file format, named by its own digest, read through a memory map."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from jaxsteer.io.files import replacing
from train.data.columns import Columns
from train.data.examples import DIGEST_BYTES, RUN
from train.data.records import Tally

_NAME = re.compile(r"(\d+)-of-(\d+)-([0-9a-f]{64})\.arrow")
_NARROW = 2**16  # ids below take two bytes


class Shard(NamedTuple):
    """Tokenised examples of some rows, and what was counted of the rows."""

    columns: Columns
    tally: Tally


class Place(NamedTuple):
    """Which of how many shards."""

    number: int
    of: int


def place_of(path: Path) -> Place | None:
    """What a file's name says; None if it is no shard's."""
    match = _NAME.fullmatch(path.name)
    return Place(int(match[1]), int(match[2])) if match else None


def write(folder: Path, place: Place, shard: Shard) -> Path:
    """Write a shard; the file is complete or absent.

    Raises:
        OSError: the folder cannot be written to.
    """
    columns = shard.columns
    ids = columns.ids.astype(np.uint16 if columns.ids.max(initial=0) < _NARROW else np.int32)
    arrays = {
        "ids": pa.ListArray.from_arrays(pa.array(columns.starts), pa.array(ids)),
        "runs": pa.ListArray.from_arrays(pa.array(columns.run_starts), _as_binary(columns.runs)),
        "prompt_length": pa.array(columns.prompt_lengths),
        "notes": pa.array(columns.notes),
        "digest": _as_binary(columns.digests),
        "source": pa.array(columns.sources, pa.string()),
        "answer": pa.array(columns.answers, pa.string()),
    }
    facts = {"tally": json.dumps(shard.tally.to_json()), "files": json.dumps(columns.files)}
    batch = pa.RecordBatch.from_arrays(list(arrays.values()), list(arrays)).replace_schema_metadata(facts)
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, batch.schema) as writer:
        writer.write_batch(batch)
    content = sink.getvalue()
    digest = hashlib.sha256(content).hexdigest()
    path = folder / f"{place.number:05}-of-{place.of:05}-{digest}.arrow"
    with replacing(path) as file:
        file.write(content)
    return path


def read(path: Path) -> Shard | None:
    """A shard whose arrays are views of the mapped file; None if the file is missing or damaged."""
    try:
        with path.open("rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() not in path.name:
                return None
        batch = pa.ipc.open_file(pa.memory_map(str(path))).get_batch(0)
    except OSError:
        return None
    ids, runs, digests = (batch.column(name) for name in ("ids", "runs", "digest"))
    plain = lambda array: array.to_numpy(zero_copy_only=True)
    columns = Columns(
        plain(ids.values),
        plain(ids.offsets),
        _from_binary(runs.values, RUN),
        plain(runs.offsets),
        plain(batch.column("prompt_length")),
        plain(batch.column("notes")),
        _from_binary(digests, np.dtype((np.uint8, DIGEST_BYTES))),
        _Texts(batch.column("source")),
        _Texts(batch.column("answer")),
    )
    facts = batch.schema.metadata
    columns.__dict__["files"] = json.loads(facts[b"files"])  # not to be found by reading all sources
    return Shard(columns, Tally.of(json.loads(facts[b"tally"])))


def _as_binary(rows: np.ndarray) -> pa.Array:
    """An array [n, ...] as n items of bytes."""
    kind = pa.binary(rows.nbytes // max(len(rows), 1) or 1)
    return pa.FixedSizeBinaryArray.from_buffers(kind, len(rows), [None, pa.py_buffer(np.ascontiguousarray(rows))])


def _from_binary(array: pa.Array, dtype: np.dtype) -> np.ndarray:
    """Items of bytes as an array [n, ...], a view."""
    if not len(array):
        return np.empty(0, dtype)
    return np.frombuffer(array.buffers()[1], dtype, len(array), array.offset * dtype.itemsize)


class _Texts(Sequence[Any]):
    """An Arrow array of texts as a sequence of Python's."""

    def __init__(self, array: pa.Array) -> None:
        self._array = array

    def __len__(self) -> int:
        return len(self._array)

    def __getitem__(self, row: Any) -> Any:
        return self._array[row].as_py()

    def __iter__(self) -> Iterator[Any]:
        return iter(self._array.to_pylist())
