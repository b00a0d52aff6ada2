"""Text files whose errors name the file and the line: UTF-8 texts and JSON Lines."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jaxsteer.io.files import parse_json


def read_text(path: str | Path) -> str:
    """The text of a UTF-8 file, without a byte order mark.

    Raises:
        ValueError: naming file and line: not UTF-8.
    """
    raw = Path(path).read_bytes()
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise ValueError(f"{path}:{line}: not UTF-8 text ({error.reason}); save the file as UTF-8") from None


def json_lines(path: str | Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield ("path:line", object) for every non-blank line of a JSON Lines file.

    Raises:
        ValueError: naming file and line: a line that is not UTF-8 text or not a JSON object.
    """
    with Path(path).open("rb") as file:
        for number, line in enumerate(file, 1):
            source = f"{path}:{number}"
            try:
                # Some editors begin a file with a byte order mark.
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise ValueError(f"{source}: not UTF-8 text ({error.reason} at byte {error.start})") from None
            if text.strip():
                yield source, parse_object(text, source)


def parse_object(text: str, source: str) -> dict[str, Any]:
    """Parse one JSON object.

    Args:
        text: the JSON text, one line.
        source: "path:line", for error messages.

    Raises:
        ValueError: naming the source: not JSON, nested too deeply, or not an object.
    """
    row = parse_json(text, source)
    if not isinstance(row, dict):
        raise ValueError(f"{source}: got a JSON {type(row).__name__}, expected one object on one line")
    return row
