"""Examples of a recipe in memory: all of them, or those that are chosen among more than fit."""

from __future__ import annotations

import hashlib
import json
import time
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxsteer.io import cache_folder
from jaxsteer.io.files import replacing
from train.data.examples import Example
from train.data.records import CHUNK, Part, Recipe, Records, Tally

WORTH_SECONDS = 2.0
"""A scan that took less time than this is not kept for the next run."""


def load(recipe: Recipe) -> list[Example]:
    """The examples of a recipe, in order.

    Raises:
        ValueError: as `Records`.
    """
    if recipe.choose is None:
        return [example for part in recipe.parts for example in _read_all(part)]
    scans = [scan(part.records) for part in recipe.parts]
    for part, found in zip(recipe.parts, scans, strict=True):
        part.records.conclude(found.tally)
    numbers = recipe.index([len(found.rows) for found in scans])
    wanted, where = np.unique(numbers, return_inverse=True)
    ends = np.cumsum([len(found.rows) for found in scans])
    taken = list[Example]()
    for part, found, end in zip(recipe.parts, scans, ends.tolist(), strict=True):
        some = wanted[(wanted >= end - len(found.rows)) & (wanted < end)] - (end - len(found.rows))
        taken += _take(part, found.rows[some])
    return [taken[place] for place in where.tolist()]


def _read_all(part: Part) -> Iterator[Example]:
    """Yield the examples of a part, reading a chunk of rows at a time."""
    tally = Tally()
    for start in range(0, len(part.records), CHUNK):
        examples, _, counted = part.records.read(start, min(start + CHUNK, len(part.records)))
        tally += counted
        yield from _named(part, examples)
    part.records.conclude(tally)


def _take(part: Part, rows: np.ndarray) -> Iterator[Example]:
    """Yield the examples of some rows, in ascending order."""
    for stretch in np.split(rows, np.flatnonzero(np.diff(rows) != 1) + 1):
        if len(stretch):
            yield from _named(part, part.records.read(int(stretch[0]), int(stretch[-1]) + 1).examples)


def _named(part: Part, examples: Sequence[Example]) -> Iterator[Example]:
    for example in examples:
        yield replace(example, source=part.prefix + example.source) if part.prefix else example


class Scan(NamedTuple):
    """What is known of the examples of records after all have been read once.

    rows   int64 [n], the row of each example
    asks   uint64 [n], 64 bits of a digest of what each example asks
    tally  of all rows
    """

    rows: np.ndarray
    asks: np.ndarray
    tally: Tally


def scan(records: Records) -> Scan:
    """Read all records once, or find what an earlier scan of the same ones has written.

    Raises:
        ValueError: as `Records`.
    """
    key = records.key
    if key not in _known:
        _known[key] = _found(key) or _scanned(records, key)
    return _known[key]


_known: dict[str, Scan] = {}
"""The scans of this process, by the keys of their records."""


def _path(key: str) -> Path:
    return cache_folder() / "scans" / f"{key}.npz"


def _found(key: str) -> Scan | None:
    """The scan that an earlier process has written."""
    try:
        with np.load(_path(key), allow_pickle=False) as file:
            return Scan(file["rows"], file["asks"], Tally.of(json.loads(str(file["tally"]))))
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None


def _scanned(records: Records, key: str) -> Scan:
    """Read all records, and write the scan if that took long."""
    began = time.perf_counter()
    rows, asks, tally = list[np.ndarray](), list[np.ndarray](), Tally()
    for start in range(0, len(records), CHUNK):
        read = records.read(start, min(start + CHUNK, len(records)))
        rows.append(np.array(read.rows, np.int64))
        asks.append(np.array([_asks(example) for example in read.examples], np.uint64))
        tally += read.tally
    found = Scan(np.concatenate([_NOTHING, *rows]), np.concatenate([_NOTHING.astype(np.uint64), *asks]), tally)
    if time.perf_counter() - began >= WORTH_SECONDS:
        with suppress(OSError):
            _path(key).parent.mkdir(parents=True, exist_ok=True)
            with replacing(_path(key)) as file:
                columns: dict[str, Any] = {"tally": np.array(json.dumps(tally.to_json()))}
                np.savez(file, rows=found.rows, asks=found.asks, **columns)
    return found


_NOTHING = np.empty(0, np.int64)


def _asks(example: Example) -> int:
    turns = example.context.turns or example.turns
    return int.from_bytes(hashlib.blake2b(json.dumps(turns).encode(), digest_size=8).digest(), "little")
