"""The record of a run: metrics.jsonl, one line per step."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Sequence
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

from jaxsteer.io.files import replacing
from train.run.leaves import SaveError
from train.run.trackers import Tracker, numbers

_WORDS = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


class MetricsWriter:
    """Appends one JSON line per step, flushed at once. A context manager.

    Args:
        path: the .jsonl file, created if missing. None: nothing is written (another process writes).
        resume_from: the first step that a resumed run will write; its line and later ones are dropped, and so is a
            half-written last line. None for a new run, which must find no lines.
        trackers: where the numbers go too; closed with the writer.

    Raises:
        ValueError: a new run finds lines; or, when resuming, a line is not a JSON object with a step.
    """

    def __init__(
        self, path: str | Path | None, *, resume_from: int | None = None, trackers: Sequence[Tracker] = ()
    ) -> None:
        self._trackers = trackers
        self.path = Path(os.devnull if path is None else path)
        if path is None:
            pass
        elif resume_from is None:
            if self.path.exists() and self.path.stat().st_size:
                raise ValueError(
                    f"{self.path}: holds the metrics of another run; resume that run, or use another folder"
                )
        elif self.path.exists():
            self._drop_from(resume_from)
        self._file = self.path.open("a", encoding="utf-8")

    def write(self, step: int, /, **values: Any) -> None:
        """Append a line: the step, then numbers, arrays of one element, text, booleans, None, or lists of them.

        Raises:
            ValueError: a value of another kind, or one named "step".
            SaveError: the disk is full, or not writable.
        """
        if "step" in values:
            raise ValueError(f"{self.path}: a value may not be called 'step': that is the line's own number")
        row = {"step": int(step)} | {name: _plain(name, value) for name, value in values.items()}
        try:
            self._file.write(json.dumps(row, allow_nan=False) + "\n")
            self._file.flush()
        except OSError as error:
            raise SaveError(
                f"{self.path}: could not be written ({error.strerror}). Fix this, then continue from the last "
                "checkpoint with --resume"
            ) from error
        for tracker in self._trackers:
            tracker.write(int(step), numbers(values))

    def close(self) -> None:
        """Close the file and the trackers. May be called more than once."""
        self._file.close()
        trackers, self._trackers = self._trackers, ()
        for tracker in trackers:
            tracker.close()

    def __enter__(self) -> MetricsWriter:
        """The writer itself."""
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Close the file; an error in progress is not replaced by another."""
        with nullcontext() if kind is None else suppress(OSError):
            self.close()

    def _drop_from(self, step: int) -> None:
        kept = [line for line, row in _rows(self.path) if row["step"] < step]
        with replacing(self.path) as file:
            file.write("".join(line + "\n" for line in kept).encode())


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl, oldest first, with "NaN" and "Infinity" turned back into floats.

    A half-written last line is left out.

    Raises:
        ValueError: a line before the last is not a JSON object with a step.
        FileNotFoundError: there is no such file.
    """
    return [{name: _words(value) for name, value in row.items()} for _, row in _rows(Path(path))]


def _words(value: Any) -> Any:
    """A value with the words for NaN and infinity turned back into floats."""
    if isinstance(value, list):
        return [_words(each) for each in value]
    return _WORDS.get(value, value) if isinstance(value, str) else value


def _rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(text, parsed) of each line; a half-written last line is left out."""
    lines = path.read_bytes().split(b"\n")
    for number, raw in enumerate(lines, start=1):
        if not raw.strip():
            continue
        try:
            line = raw.decode("utf-8")
            row = json.loads(line)
            if not isinstance(row, dict) or not isinstance(row.get("step"), int):
                raise ValueError("not an object with a whole number as its step")
        except (ValueError, RecursionError) as error:
            if number == len(lines):  # no newline after it: the process was killed while writing
                return
            raise ValueError(f"{path}:{number}: not a line of metrics ({error}); repair or delete the line") from None
        yield line, row


def _plain(name: str, value: Any) -> Any:
    """A value in a form that JSON can hold."""
    if hasattr(value, "item") and getattr(value, "size", 1) == 1:
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, (list, tuple)):
        return [_plain(name, each) for each in value]
    raise ValueError(f"metric {name!r}: got {type(value).__name__}, need numbers, text, a boolean or None")
