"""Text files whose errors name the file and the line: UTF-8 texts and JSON Lines."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from jaxsteer.io.files import parse_json


def read_text(path: str | Path) -> str:
    """The text of a UTF-8 file, without a byte order mark.

    Raises:
        ValueError: naming the file: it cannot be read. Naming file and line: not UTF-8, or a NUL character.
    """
    try:
        raw = Path(path).read_bytes()
    except OSError as error:
        raise _unreadable(path, error) from None
    if b"\0" in raw:
        line = raw.count(b"\n", 0, raw.index(b"\0")) + 1
        refuse_nul(raw, f"{path}:{line}")
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise ValueError(f"{path}:{line}: not UTF-8 text ({error.reason}); save the file as UTF-8") from None


def json_lines(path: str | Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield ("path:line", object) for every non-blank line of a JSON Lines file.

    Raises:
        ValueError: naming the file: it cannot be read. Naming file and line: a line that is not UTF-8 text or not a
            JSON object.
    """
    with reading(path) as file:
        for number, line in enumerate(file, 1):
            if not is_blank(line, number):
                yield parse_line(line, path, number)


@contextmanager
def reading(path: str | Path) -> Iterator[BinaryIO]:
    """Open a file to read its bytes.

    Raises:
        ValueError: naming the file: it cannot be read.
    """
    try:
        with Path(path).open("rb") as file:
            yield file
    except OSError as error:
        raise _unreadable(path, error) from None


def is_blank(line: bytes, number: int) -> bool:
    """Whether a line, counted from 1, is white space alone; a line that is not UTF-8 text is not."""
    try:
        return not line.decode(_codec(number)).strip()
    except UnicodeDecodeError:
        return False


def parse_line(line: bytes, path: str | Path, number: int) -> tuple[str, dict[str, Any]]:
    """("path:line", object) of a line of a JSON Lines file, counted from 1.

    Raises:
        ValueError: naming file and line: not UTF-8 text, or not a JSON object.
    """
    source = f"{path}:{number}"
    refuse_nul(line, source)
    try:
        return source, parse_object(line.decode(_codec(number)), source)
    except UnicodeDecodeError as error:
        raise ValueError(f"{source}: not UTF-8 text ({error.reason} at byte {error.start})") from None


def _codec(number: int) -> str:
    return "utf-8-sig" if number == 1 else "utf-8"  # some editors begin a file with a byte order mark


def parse_object(text: str, source: str) -> dict[str, Any]:
    """Parse one JSON object.

    Args:
        text: the JSON text, one line.
        source: "path:line", for error messages.

    Raises:
        ValueError: naming the source: not JSON, nested too deeply, or not an object.
    """
    if text.strip() == "[":
        raise ValueError(
            f"{source}: a JSON list over several lines; JSON Lines have one object per line, as "
            "`jq -c '.[]' data.json > data.jsonl` writes them"
        )
    row = parse_json(text, source)
    if not isinstance(row, dict):
        raise ValueError(f"{source}: got a JSON {type(row).__name__}, expected one object on one line")
    return row


def refuse_nul(text: str | bytes, source: str) -> None:
    """Raise ValueError, naming the source, for a NUL character: the sign of another encoding or of a damaged file."""
    if (b"\0" if isinstance(text, bytes) else "\0") in text:  # type: ignore[operator]
        raise ValueError(f"{source}: has a NUL character; the file is damaged, or UTF-16: save it as UTF-8")


def _unreadable(path: str | Path, error: OSError) -> ValueError:
    """What to say about a file that cannot be opened or read."""
    reason = "no such file" if isinstance(error, FileNotFoundError) else f"cannot be read ({error.strerror})"
    return ValueError(f"{Path(path)}: {reason}")
