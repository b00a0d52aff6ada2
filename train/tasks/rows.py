"""Rows of a data set, from local files (.jsonl, .csv, .tsv, .parquet) or from the Hugging Face hub."""

from __future__ import annotations

import csv
import io
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from train.data.text_files import json_lines, read_text
from train.tasks.record import Row

_NAN = ("NaN", "nan")  # as pandas and NumPy write missing numbers into .csv files

Rows = list[tuple[str, Row]]
"""Rows with their source, "file:line" or "name split:number", for error messages."""

SUFFIXES = (".jsonl", ".csv", ".tsv", ".parquet")


def is_local(data: str) -> bool:
    """Whether a source is a local path, not a hub id: it contains {split}, has a known suffix, or exists."""
    return "{split}" in data or data.endswith(SUFFIXES) or Path(data).exists()


def read_split(data: str, split: str, *, subset: str | None = None, revision: str | None = None) -> Rows:
    """Read the rows of one split.

    Args:
        data: a path that contains {split}, a folder of files named after their splits, a single file, or a hub id.
        split: name of the split in the source.
        subset: configuration of a hub data set.
        revision: revision of a hub data set.

    Raises:
        ValueError: the file is missing or malformed, or the hub cannot be read; says what to do.
    """
    if not is_local(data):
        return read_hub(data, split, subset=subset, revision=revision)
    path = Path(data.replace("{split}", split))
    if path.is_dir():
        files = [path / f"{split}{suffix}" for suffix in SUFFIXES]
        existing = [file for file in files if file.exists()]
        if not existing:
            raise ValueError(f"{path}: has no file of the split {split!r}, e.g. {split}.jsonl")
        path = existing[0]
    return read_file(path)


def read_file(path: str | Path) -> Rows:
    """Read the rows of a local file; its suffix determines the format.

    Values in .csv and .tsv files are strings, and None where the cell is NaN.

    Raises:
        ValueError: naming the file and, if possible, the line: no such file, an unknown suffix, not UTF-8, a malformed
            line, no rows.
    """
    path = Path(path)
    if path.suffix not in SUFFIXES:
        raise ValueError(f"{path}: unknown file type; known suffixes are {', '.join(SUFFIXES)}")
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    if path.suffix == ".jsonl":
        rows: Rows = list(json_lines(path))
    elif path.suffix == ".parquet":
        rows = _read_parquet(path)
    else:
        rows = _read_csv(path, "\t" if path.suffix == ".tsv" else ",")
    if not rows:
        raise ValueError(f"{path}: no rows")
    return rows


def _read_csv(path: Path, delimiter: str) -> Rows:
    """The rows of a .csv or .tsv file, whose first line names the columns."""
    csv.field_size_limit(sys.maxsize)  # the default refuses texts of more than 128 KiB
    reader = csv.DictReader(io.StringIO(read_text(path), newline=""), delimiter=delimiter, strict=True)
    rows: Rows = []
    try:
        if repeated := [name for name, count in Counter(reader.fieldnames or ()).items() if count > 1]:
            raise ValueError(f"{path}:1: more than one column is called {', '.join(map(repr, repeated))}")
        for row in reader:
            source = f"{path}:{reader.line_num}"
            if None in row or None in row.values():
                raise ValueError(
                    f"{source}: has more or fewer fields than the {len(reader.fieldnames or ())} columns; put quotes "
                    "around texts that contain the separator or a line break"
                )
            rows.append((source, {name: None if cell in _NAN else cell for name, cell in row.items()}))
    except csv.Error as error:
        raise ValueError(f"{path}:{reader.reader.line_num}: {error}") from None
    return rows


def _read_parquet(path: Path) -> Rows:
    """The rows of a Parquet file."""
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.read_table(path)
        rows = table.to_pylist()
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise ValueError(f"{path}: not a Parquet file ({error})") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: has a text that is not UTF-8 ({error.reason})") from None
    return [(f"{path}:{number}", row) for number, row in enumerate(rows, 1)]


def read_hub(name: str, split: str, *, subset: str | None = None, revision: str | None = None) -> Rows:
    """Read the rows of one split of a hub data set, through the `datasets` library and its cache.

    Raises:
        ValueError: the hub cannot be reached, or has no such data set or split; says how to use local files instead.
    """
    import datasets

    try:
        data: Any = datasets.load_dataset(name, subset, split=split, revision=revision)
    except Exception as error:  # errors of requests, fsspec, pyarrow and the hub's client come through
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise ValueError(
            f"{name}: the split {split!r} cannot be read from the Hugging Face hub ({reason[0]}). Without the hub, "
            "give local files with the same columns: --task.data 'folder/{split}.jsonl' (or .csv, .tsv, .parquet), "
            f"where {{split}} stands for {split} and the other splits, or files with --task.train and --task.test"
        ) from None
    return [(f"{name} {split}:{number}", row) for number, row in enumerate(data, 1)]


def check_columns(rows: Sequence[tuple[str, Row]], columns: Sequence[str]) -> None:
    """Raise ValueError for the first row that lacks one of the columns; the message lists those present."""
    for source, row in rows:
        if missing := [name for name in columns if name not in row]:
            raise ValueError(
                f"{source}: no column {', '.join(map(repr, missing))}; there are {', '.join(map(repr, row))}"
            )
