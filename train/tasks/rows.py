"""Rows of a data set: from local files (.jsonl, .csv, .tsv, .parquet) or from the Hugging Face hub."""

from __future__ import annotations

import csv
import io
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from train.data.jsonl import json_lines
from train.tasks.record import Row

Rows = list[tuple[str, Row]]
"""Rows with their place, "file:line" or "source split:number", for messages."""

SUFFIXES = (".jsonl", ".csv", ".tsv", ".parquet")


def is_local(data: str) -> bool:
    """Whether a source is meant to be on this machine: it has a {split}, a known ending, or is there."""
    return "{split}" in data or data.endswith(SUFFIXES) or Path(data).exists()


def read_split(data: str, split: str, *, subset: str | None = None, revision: str | None = None) -> Rows:
    """The rows of one split of a source.

    Args:
        data: a path with {split} in it, a folder of files named after their splits, one file, or a hub id.
        split: its name in the source.
        subset, revision: of a hub data set.

    Raises:
        ValueError: no such file, or the hub cannot be read; says what to do.
    """
    if not is_local(data):
        return read_hub(data, split, subset=subset, revision=revision)
    path = Path(data.replace("{split}", split))
    if path.is_dir():
        found = [path / f"{split}{suffix}" for suffix in SUFFIXES if (path / f"{split}{suffix}").exists()]
        if not found:
            raise ValueError(f"{path}: has no file of the split {split!r}, e.g. {split}.jsonl")
        path = found[0]
    return read_file(path)


def read_file(path: str | Path) -> Rows:
    """The rows of a local file; its ending says what it is. Values of .csv and .tsv are texts.

    Raises:
        ValueError: with the line where there is one: no such file, another ending, not UTF-8, a broken line, no rows.
    """
    path = Path(path)
    if path.suffix not in SUFFIXES:
        raise ValueError(f"{path}: cannot tell what this is; known endings are {', '.join(SUFFIXES)}")
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    if path.suffix == ".jsonl":
        rows: Rows = list(json_lines(path))
    elif path.suffix == ".parquet":
        rows = _parquet(path)
    else:
        rows = _separated(path, "\t" if path.suffix == ".tsv" else ",")
    if not rows:
        raise ValueError(f"{path}: no rows")
    return rows


def _separated(path: Path, delimiter: str) -> Rows:
    """Rows of a file whose first line names the columns."""
    raw = path.read_bytes()
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise ValueError(f"{path}:{line}: not UTF-8 text ({error.reason}); save the file as UTF-8") from None
    csv.field_size_limit(sys.maxsize)  # the default refuses texts of more than 128 KiB
    reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    rows: Rows = []
    try:
        for row in reader:
            where = f"{path}:{reader.line_num}"
            if None in row or None in row.values():
                raise ValueError(
                    f"{where}: has more or fewer fields than the {len(reader.fieldnames or ())} columns; put quotes "
                    "around texts that contain the separator or a line break"
                )
            rows.append((where, row))
    except csv.Error as error:
        raise ValueError(f"{path}:{reader.reader.line_num}: {error}") from None
    return rows


def _parquet(path: Path) -> Rows:
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.read_table(path)
    except pyarrow.ArrowInvalid as error:
        raise ValueError(f"{path}: not a Parquet file ({error})") from None
    return [(f"{path}:{number}", row) for number, row in enumerate(table.to_pylist(), 1)]


def read_hub(name: str, split: str, *, subset: str | None = None, revision: str | None = None) -> Rows:
    """The rows of one split of a hub data set, by the `datasets` library and its cache.

    Raises:
        ValueError: the hub cannot be reached, or has no such data set or split; says how to pass local files.
    """
    import datasets

    try:
        data: Any = datasets.load_dataset(name, subset, split=split, revision=revision)
    except Exception as error:  # the library lets errors of many others through: requests, fsspec, pyarrow, the hub's
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise ValueError(
            f"{name}: the split {split!r} cannot be read from the Hugging Face hub ({reason[0]}). Without the hub, "
            "give local files of the same columns: --task.data 'folder/{split}.jsonl' (or .csv, .tsv, .parquet), where "
            f"{{split}} stands for {split} and the other splits, or single files by --task.train and --task.test"
        ) from None
    return [(f"{name} {split}:{number}", row) for number, row in enumerate(data, 1)]


def check_columns(rows: Sequence[tuple[str, Row]], columns: Sequence[str]) -> None:
    """Raise ValueError for the first row that lacks one of the columns; lists those present."""
    for where, row in rows:
        if missing := [name for name in columns if name not in row]:
            raise ValueError(
                f"{where}: no column {', '.join(map(repr, missing))}; there are {', '.join(map(repr, row))}"
            )
