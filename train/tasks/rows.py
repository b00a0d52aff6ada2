"""Where the rows of a data set are: local files (.jsonl, .csv, .tsv, .parquet) or the Hugging Face hub."""

from __future__ import annotations

import csv
import glob
import io
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from train.data.text_files import read_text
from train.tasks.row_sources import (
    HubRows,
    JoinedRows,
    JsonlRows,
    ListedRows,
    ParquetRows,
    Rows,
    RowSource,
    digest_of_file,
)

_NAN = ("NaN", "nan")  # as pandas and NumPy write missing numbers into .csv files

SUFFIXES = (".jsonl", ".csv", ".tsv", ".parquet")
RECORDS = (".jsonl", ".parquet")
"""Files whose values may be lists and objects."""


def is_local(data: str) -> bool:
    """Whether a source is a local path, not a hub id: it contains {split} or *, has a known suffix, or exists."""
    return "{split}" in data or "*" in data or data.endswith(SUFFIXES) or Path(data).exists()


def read_split(data: str, split: str, *, subset: str | None = None, revision: str | None = None) -> RowSource:
    """The rows of one split.

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
    if path.is_dir() and "{split}" not in data:
        return read_file(_of_split(path, split))
    return read_file(path)


def _of_split(folder: Path, split: str) -> str:
    """What in a folder holds a split: a folder or a file of its name, or shards such as train-00000-of-00002."""
    if (folder / split).is_dir():
        return str(folder / split)
    for name in (split, f"{split}-[0-9]*"):
        for suffix in SUFFIXES:
            if glob.glob(str(Path(glob.escape(str(folder))) / f"{name}{suffix}")):
                return str(Path(glob.escape(str(folder))) / f"{name}{suffix}")
    raise ValueError(f"{folder}: has no file of the split {split!r}, e.g. {split}.jsonl")


def files_of(path: str | Path, suffixes: Sequence[str] = SUFFIXES) -> list[Path]:
    """The files that a path stands for, in the order of their names: one, those of a folder, or those of a pattern.

    Raises:
        ValueError: naming the path: there are none.
    """
    path = Path(path)
    if path.is_dir():
        found = sorted(each for each in path.iterdir() if each.suffix in suffixes and not each.name.startswith("."))
    elif path.exists() or not glob.has_magic(str(path)):
        return [path]
    else:
        found = sorted(Path(each) for each in glob.glob(str(path), recursive=True) if Path(each).is_file())
    if not found:
        raise ValueError(f"{path}: no files ({', '.join(suffixes)}) in it")
    return found


def read_file(path: str | Path) -> RowSource:
    """The rows of a local file, or of all files of a folder or a pattern; the suffix determines the format.

    Values in .csv and .tsv files are strings, and None where the cell is NaN.

    Raises:
        ValueError: naming the file and, if possible, the line: no such file, an unknown suffix, not UTF-8, a malformed
            line, no rows.
    """
    parts = [_open_file(each) for each in files_of(path)]
    return parts[0] if len(parts) == 1 else JoinedRows(parts)


def read_jsonl_files(path: str | Path) -> RowSource:
    """The lines of a JSON Lines file of any name, or of those that a folder or a pattern stands for."""
    parts = [JsonlRows(each) for each in files_of(path, (".jsonl",))]
    return parts[0] if len(parts) == 1 else JoinedRows(parts)


def read_records(path: str | Path) -> RowSource:
    """Rows that may hold conversations: Parquet by its suffix, else JSON Lines; one file, a folder or a pattern."""
    parts = [_open_file(each) if each.suffix == ".parquet" else JsonlRows(each) for each in files_of(path, RECORDS)]
    return parts[0] if len(parts) == 1 else JoinedRows(parts)


def _open_file(path: Path) -> RowSource:
    if path.suffix not in SUFFIXES:
        raise ValueError(f"{path}: unknown file type; known suffixes are {', '.join(SUFFIXES)}")
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    if path.suffix == ".jsonl":
        return JsonlRows(path)
    if path.suffix == ".parquet":
        return ParquetRows(path)
    return ListedRows(str(path), _read_csv(path, "\t" if path.suffix == ".tsv" else ","), digest_of_file(path))


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


def read_hub(name: str, split: str, *, subset: str | None = None, revision: str | None = None) -> RowSource:
    """The rows of one split of a hub data set, through the `datasets` library and its cache.

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
    return HubRows(data, f"{name} {split}")


def check_columns(rows: Rows, columns: Sequence[str]) -> None:
    """Raise ValueError for the first row that lacks one of the columns; the message lists those present."""
    for source, row in rows:
        if missing := [name for name in columns if name not in row]:
            raise ValueError(
                f"{source}: no column {', '.join(map(repr, missing))}; there are {', '.join(map(repr, row))}"
            )
