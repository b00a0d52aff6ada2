"""Rows that are read when they are needed, wherever they are."""

from __future__ import annotations

import hashlib
import os
from abc import ABC, abstractmethod
from array import array
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from train.data.text_files import is_blank, json_lines, parse_line, reading
from train.tasks.record import Part, Row

Rows = list[tuple[str, Row]]
"""Rows with their source, "file:line" or "name split:number", for error messages."""


class RowSource(ABC):
    """Rows in a fixed order.

    name  of the file or data set, for messages
    """

    name: str

    @property
    @abstractmethod
    def key(self) -> str:
        """Differs wherever the rows or their sources differ."""

    @abstractmethod
    def __len__(self) -> int:
        """Number of rows."""

    @abstractmethod
    def take(self, numbers: Sequence[int]) -> Rows:
        """The rows of these numbers; fast where they follow one another.

        Raises:
            ValueError: naming the row: it is malformed.
        """

    def read(self, start: int, stop: int) -> Rows:
        """The rows from `start` to before `stop`."""
        return self.take(range(start, stop))

    def all(self) -> Rows:
        """Every row."""
        return self.read(0, len(self))

    def first(self) -> tuple[str, Row] | None:
        """The first row, found without counting the others; None if there are none."""
        return self.take([0])[0] if len(self) else None


class ListedRows(RowSource):
    """Rows in memory."""

    def __init__(self, name: str, rows: Rows, digest: str) -> None:
        self.name, self._rows, self._digest = name, rows, digest

    @property
    def key(self) -> str:
        """Name, and digest of the content."""
        return f"{self.name} {self._digest}"

    def __len__(self) -> int:
        """Number of rows."""
        return len(self._rows)

    def take(self, numbers: Sequence[int]) -> Rows:
        """Some of them."""
        return [self._rows[number] for number in numbers]


class _File:
    """A file that must not change while it is used: what was tokenised is found by what it was when it was digested."""

    def __init__(self, path: str | Path) -> None:
        self.path, self._seen = Path(path), (-1, -1)

    @contextmanager
    def open(self) -> Iterator[BinaryIO]:
        """Open it to read its bytes.

        Raises:
            ValueError: naming the file: it cannot be read, or has changed since it was first opened.
        """
        with reading(self.path) as file:
            status = os.fstat(file.fileno())
            now = status.st_size, status.st_mtime_ns
            if self._seen not in ((-1, -1), now):
                raise ValueError(f"{self.path}: has changed while it was being read; start again")
            self._seen = now
            yield file

    def digest(self) -> str:
        """sha256 of its bytes, in hexadecimal."""
        with self.open() as file:
            return hashlib.file_digest(file, "sha256").hexdigest()  # type: ignore[arg-type]  # its stub wants readinto


class JsonlRows(RowSource):
    """The lines of a JSON Lines file that are not blank."""

    def __init__(self, path: str | Path) -> None:
        self.name, self._file = str(path), _File(path)

    @cached_property
    def key(self) -> str:
        """Path, and digest of the content."""
        return f"{self.name} {self._file.digest()}"

    @cached_property
    def _index(self) -> tuple[array, array]:
        """Where each row begins in the file, and the number of its line."""
        offsets, lines, at = array("q"), array("q"), 0
        with self._file.open() as file:
            for number, line in enumerate(file, 1):
                if line[:1] == b"{" or not is_blank(line, number):
                    offsets.append(at)
                    lines.append(number)
                at += len(line)
        return offsets, lines

    def __len__(self) -> int:
        """Number of rows."""
        return len(self._index[0])

    def first(self) -> tuple[str, Row] | None:
        """The first line that is not blank."""
        return next(json_lines(self.name), None)

    def take(self, numbers: Sequence[int]) -> Rows:
        """The objects of these lines."""
        offsets, lines = self._index
        rows: Rows = []
        with self._file.open() as file:
            for number in numbers:
                if file.tell() != offsets[number]:
                    file.seek(offsets[number])
                rows.append(parse_line(file.readline(), self.name, lines[number]))
        return rows


class ParquetRows(RowSource):
    """The rows of a Parquet file; one row group at a time is in memory."""

    def __init__(self, path: str | Path) -> None:
        self.name, self._path, self._held = str(path), Path(path), (-1, None)

    @cached_property
    def key(self) -> str:
        """Path, and digest of the content."""
        return f"{self._path} {digest_of_file(self._path)}"

    @cached_property
    def _file(self) -> Any:
        import pyarrow
        import pyarrow.parquet

        try:
            return pyarrow.parquet.ParquetFile(self._path, memory_map=True)
        except (pyarrow.ArrowInvalid, OSError) as error:
            raise ValueError(f"{self._path}: not a Parquet file ({error})") from None

    @cached_property
    def _ends(self) -> list[int]:
        """Number of rows up to the end of each row group."""
        groups = range(self._file.num_row_groups)
        return list(accumulate(self._file.metadata.row_group(group).num_rows for group in groups))

    def __len__(self) -> int:
        """Number of rows."""
        return self._ends[-1] if self._ends else 0

    def take(self, numbers: Sequence[int]) -> Rows:
        """These rows as Python values."""
        rows: Rows = []
        for group, some in _runs(numbers, self._ends):
            first = self._ends[group - 1] if group else 0
            rows += [
                (f"{self._path}:{number + 1}", row)
                for number, row in zip(some, self._values(group, [n - first for n in some]), strict=True)
            ]
        return rows

    def _values(self, group: int, rows: Sequence[int]) -> list[Row]:
        import pyarrow

        try:
            if self._held[0] != group:
                self._held = (group, self._file.read_row_group(group))
            table: Any = self._held[1]
            whole = len(rows) and rows[-1] - rows[0] + 1 == len(rows)
            return (table.slice(rows[0], len(rows)) if whole else table.take(rows)).to_pylist()
        except (pyarrow.ArrowInvalid, OSError) as error:
            raise ValueError(f"{self._path}: not a Parquet file ({error})") from None
        except UnicodeDecodeError as error:
            raise ValueError(f"{self._path}: has a text that is not UTF-8 ({error.reason})") from None


class HubRows(RowSource):
    """The rows of a split of a hub data set, in the memory-mapped files of the `datasets` library."""

    def __init__(self, data: Any, name: str) -> None:
        self._data, self.name = data, name

    @cached_property
    def key(self) -> str:
        """The library's fingerprint, and digests of its files."""
        files = [Path(each["filename"]) for each in self._data.cache_files]
        return f"{self.name} {self._data._fingerprint} {_digests(files)}"

    def __len__(self) -> int:
        """Number of rows."""
        return len(self._data)

    def take(self, numbers: Sequence[int]) -> Rows:
        """These rows as Python values."""
        columns = self._data[numbers if isinstance(numbers, range) else list(numbers)]
        rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
        return [(f"{self.name}:{number + 1}", row) for number, row in zip(numbers, rows, strict=True)]


class JoinedRows(RowSource):
    """The rows of several sources, one source after another."""

    def __init__(self, parts: Sequence[RowSource]) -> None:
        self.name, self._parts = ", ".join(part.name for part in parts[:3]), parts

    @cached_property
    def key(self) -> str:
        """Those of the parts."""
        with ThreadPoolExecutor() as pool:  # digests are computed without the interpreter's lock
            return "\n".join(pool.map(lambda part: part.key, self._parts))

    @cached_property
    def _ends(self) -> list[int]:
        return list(accumulate(map(len, self._parts)))

    def __len__(self) -> int:
        """Number of rows."""
        return self._ends[-1]

    def first(self) -> tuple[str, Row] | None:
        """The first row of the first source that has one."""
        return next((first for part in self._parts if (first := part.first()) is not None), None)

    def take(self, numbers: Sequence[int]) -> Rows:
        """These rows of the parts."""
        rows: Rows = []
        for part, some in _runs(numbers, self._ends):
            first = self._ends[part - 1] if part else 0
            rows += self._parts[part].take([number - first for number in some])
        return rows


class PickedRows(RowSource):
    """Some rows of a source, in an order: those that a part of a split names."""

    def __init__(self, rows: RowSource, part: Part) -> None:
        self.name, self._rows, self._part = rows.name, rows, part

    @property
    def key(self) -> str:
        """That of the source, and which part."""
        return f"{self._rows.key}\n{self._part.cuts}"

    @cached_property
    def _numbers(self) -> np.ndarray:
        return np.array(self._part.indices(len(self._rows)), np.int64)

    def __len__(self) -> int:
        """Number of rows."""
        return len(self._numbers)

    def first(self) -> tuple[str, Row] | None:
        """The first row of the source, which has the same columns."""
        return self._rows.first()

    def take(self, numbers: Sequence[int]) -> Rows:
        """Some of them."""
        return self._rows.take(self._numbers[numbers].tolist())


def _runs(numbers: Sequence[int], ends: Sequence[int]) -> Iterator[tuple[int, Sequence[int]]]:
    """(which part, numbers in it) for each stretch of numbers in one part, given where the parts end."""
    start = 0
    while start < len(numbers):
        part = bisect_right(ends, numbers[start])
        first = ends[part - 1] if part else 0
        stop = start + 1
        while stop < len(numbers) and first <= numbers[stop] < ends[part]:
            stop += 1
        yield part, numbers[start:stop]
        start = stop


def digest_of_file(path: Path) -> str:
    """sha256 of a file, in hexadecimal.

    Raises:
        ValueError: it cannot be read.
    """
    return _File(path).digest()


def _digests(paths: Sequence[Path]) -> str:
    with ThreadPoolExecutor() as pool:
        return " ".join(pool.map(digest_of_file, paths))
