"""Small files: one JSON reader whose errors name the file, and atomic writes."""

from __future__ import annotations

import glob
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, TypeAlias

Json: TypeAlias = Any
"""What JSON can hold: None, bool, int, float, str, list or dict. Check a value's type before using it."""

DEPTH_LIMIT = 100
"""Nesting of lists and objects beyond which JSON is refused: Python's own functions fail on a few hundred levels."""

_SURROGATE = re.compile("[\ud800-\udfff]")
_ESCAPED_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


def parse_json(text: str | bytes, where: str, *, unique_keys: bool = False) -> Json:
    """Parse JSON that may be damaged or hostile.

    Args:
        text: the JSON; bytes are UTF-8.
        where: the file, and which part of it, for the message.
        unique_keys: refuse an object that gives a key twice, instead of keeping the last value.

    Raises:
        ValueError: not JSON, more than DEPTH_LIMIT levels deep, a repeated key, or text with half of a surrogate pair
            (\\ud83d alone), which is no character; the message begins with `where`.
    """
    try:
        if isinstance(text, bytes):
            text = text.decode()
        value = json.loads(text, object_pairs_hook=_unique if unique_keys else None)
    except RecursionError:
        raise ValueError(f"{where}: nested too deeply; at most {DEPTH_LIMIT} levels are read") from None
    except ValueError as error:
        raise ValueError(f"{where}: not valid JSON ({error})") from None
    if _is_deeper_than(value, DEPTH_LIMIT):
        raise ValueError(f"{where}: nested too deeply; at most {DEPTH_LIMIT} levels are read")
    # Only an escape can make one, and whole pairs are one character after parsing.
    if _ESCAPED_SURROGATE.search(text) and (half := next(filter(None, map(surrogate_in, texts_in(value))), None)):
        raise ValueError(
            f"{where}: not valid text: {half} is half of a surrogate pair, as in text that was cut inside a character"
        )
    return value


def surrogate_in(text: str) -> str | None:
    """The first surrogate in a text, as an escape; None if there is none. UTF-8 cannot encode surrogates."""
    found = None if text.isascii() else _SURROGATE.search(text)
    return f"\\u{ord(found[0]):04x}" if found else None


def texts_in(value: Json) -> Iterator[str]:
    """Every text in a JSON value, keys of objects included, found without recursion."""
    waiting = [value]
    while waiting:
        part = waiting.pop()
        if isinstance(part, str):
            yield part
        elif isinstance(part, dict):
            waiting += [*part.keys(), *part.values()]
        elif isinstance(part, list):
            waiting += part


def _unique(pairs: list[tuple[str, Json]]) -> dict[str, Json]:
    """A JSON object, refused if it repeats a key."""
    result: dict[str, Json] = {}
    for key, value in pairs:
        if key in result:
            raise ValueError(f"{key!r} is given twice")
        result[key] = value
    return result


def _is_deeper_than(value: Json, limit: int) -> bool:
    """Whether lists and objects nest more than `limit` levels deep, found without recursion."""
    level = [value]
    for _ in range(limit + 1):
        containers = [part for part in level if isinstance(part, dict | list)]
        if not containers:
            return False
        level = [child for part in containers for child in (part.values() if isinstance(part, dict) else part)]
    return True


def read_json(path: str | Path) -> dict[str, Json]:
    """Read a file that holds a JSON object.

    Raises:
        ValueError: the file does not exist, is not JSON, nests too deeply, or is not an object.
    """
    try:
        data = parse_json(Path(path).read_bytes(), str(path))
    except (FileNotFoundError, NotADirectoryError):
        raise ValueError(f"{path}: no such file") from None
    except IsADirectoryError:
        raise ValueError(f"{path}: is a folder, expected a file") from None
    except ValueError as error:
        raise ValueError(f"{error}. Was the download or the copy cut short?") from None
    if not isinstance(data, dict):
        raise ValueError(f"{path}: expected a JSON object, got {type(data).__name__}")
    return data


@contextmanager
def replacing(path: str | Path) -> Iterator[BinaryIO]:
    """Open a temporary file next to `path` that replaces it when the block ends, and is deleted if it raises.

    Readers, and a process that is killed, see either the old file or the complete new one.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        if error.filename is None:  # as of a full disk
            raise OSError(error.errno, error.strerror, str(path)) from None
        raise
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def new_folder(path: str | Path) -> Iterator[Path]:
    """An empty folder beside `path` that is renamed to it when the block ends, and deleted if it raises.

    A process that is killed leaves nothing at `path`; what an earlier one left beside it is deleted.

    Raises:
        ValueError: see `check_free`; or another process is writing to `path`.
    """
    path = Path(path)
    check_free(path)
    path = path.resolve()
    path.parent.mkdir(parents=True, exist_ok=True)
    for stale in path.parent.glob(f".{glob.escape(path.name)}.*.partial"):
        with _locked(stale) as dead:
            if not dead:
                raise ValueError(f"{path}: another process is writing there; wait for it, or name another folder")
            shutil.rmtree(stale, ignore_errors=True)
    partial = partial_of(path)
    partial.mkdir()
    with _locked(partial):
        try:
            yield partial
            check_free(path)
            os.replace(partial, path)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def partial_of(path: str | Path) -> Path:
    """The folder that `new_folder` fills in this process."""
    path = Path(path).resolve()
    return path.with_name(f".{path.name}.{os.getpid()}.partial")


@contextmanager
def _locked(folder: Path) -> Iterator[bool]:
    """Whether this process has a folder for itself; the lock ends with the block, or with the process."""
    try:
        import fcntl

        descriptor = os.open(folder, os.O_RDONLY)
    except (FileNotFoundError, ImportError):  # deleted meanwhile; a system without these locks
        yield True
        return
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        free = True
    except BlockingIOError:
        free = False
    except OSError:  # a file system without locks
        free = True
    try:
        yield free
    finally:
        os.close(descriptor)


def check_free(path: Path) -> None:
    """Refuse to write a folder where that cannot succeed.

    Raises:
        ValueError: `path` is a file or a folder that is not empty, or that cannot be replaced, or there is no right to
            write beside it.
    """
    if os.path.lexists(path) and not path.is_dir():
        raise ValueError(f"{path}: is a file; name a folder")
    if path.is_dir():
        if any(path.iterdir()):
            raise ValueError(f"{path}: exists already; name another folder, or delete this one first")
        if path.samefile(Path.cwd()) or path.is_mount():
            raise ValueError(f"{path}: is the folder of this shell, or a mounted one; name a new folder in it")
    parent = next(parent for parent in path.absolute().parents if os.path.lexists(parent))
    if not parent.is_dir():
        raise ValueError(f"{path}: {parent} is a file; name another folder")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise ValueError(f"{path}: {parent} cannot be written to; name another folder")


def write_text(path: str | Path, text: str) -> None:
    """Write a UTF-8 text file atomically, see `replacing`."""
    with replacing(path) as file:
        file.write(text.encode())


def write_json(path: str | Path, data: Mapping[str, Json]) -> None:
    """Write an indented JSON object atomically, see `replacing`.

    NaN and the infinities, which JSON does not have, become the strings "NaN", "Infinity" and "-Infinity".

    Raises:
        ValueError: a value that JSON cannot hold.
    """
    try:
        values = json.loads(json.dumps(dict(data)), parse_constant=str)
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{path}: cannot be written as JSON ({error})") from None
    write_text(path, json.dumps(values, indent=2, ensure_ascii=False) + "\n")
