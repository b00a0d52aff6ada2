"""The record of a run: metrics.jsonl, one line a step, and the progress on the console."""

from __future__ import annotations

import json
import math
import os
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from train.devices.processes import console as first_console
from train.trackers import Tracker, numbers

_WORDS = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}
_WINDOW = 32  # updates that the speed is taken from


class MetricsWriter:
    """Appends one JSON line a step, each on disk at once. A context manager.

    Args:
        path: of the .jsonl file; made if it is missing. None: nothing is kept (another process writes).
        resume_at: None for a new run, which must find no lines there. Else the step that the run goes on at:
            lines of later steps, and a last line that a killed process left half written, are dropped.
        trackers: that are to show the numbers too; closed with the writer.

    Raises:
        ValueError: a new run finds lines; or, on resuming, a line that is no JSON object with a step.
    """

    def __init__(
        self, path: str | Path | None, *, resume_at: int | None = None, trackers: Sequence[Tracker] = ()
    ) -> None:
        self._trackers = trackers
        self.path = Path(os.devnull if path is None else path)
        if path is None:
            pass
        elif resume_at is None:
            if self.path.exists() and self.path.stat().st_size:
                raise ValueError(
                    f"{self.path}: holds the metrics of another run; resume that run, or use another folder"
                )
        elif self.path.exists():
            self._keep_up_to(resume_at)
        self._file = self.path.open("a", encoding="utf-8")

    def write(self, step: int, /, **values: Any) -> None:
        """Append a line: the step, then the values (numbers, lists of them, arrays of one, text, booleans or None).

        Raises:
            ValueError: a value of another kind, or one named "step".
        """
        if "step" in values:
            raise ValueError(f"{self.path}: a value may not be called 'step', that is the number of the line")
        row = {"step": int(step)} | {name: _plain(name, value) for name, value in values.items()}
        self._file.write(json.dumps(row, allow_nan=False) + "\n")
        self._file.flush()
        for tracker in self._trackers:
            tracker.write(int(step), numbers(values))

    def close(self) -> None:
        """Close the file; more than once does no harm."""
        self._file.close()
        trackers, self._trackers = self._trackers, ()
        for tracker in trackers:
            tracker.close()

    def __enter__(self) -> MetricsWriter:
        """The writer itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close the file."""
        self.close()

    def _keep_up_to(self, step: int) -> None:
        kept = [line for line, row in _rows(self.path) if row["step"] <= step]
        part = self.path.with_name(f".{self.path.name}.part")
        part.write_text("".join(line + "\n" for line in kept), encoding="utf-8")
        os.replace(part, self.path)


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl, oldest first, with "NaN" and "Infinity" turned back into floats.

    A last line that is half written is left out; a missing file is an error.

    Raises:
        ValueError: another line is no JSON object with a step. FileNotFoundError: there is no such file.
    """
    return [{name: _words(value) for name, value in row.items()} for _, row in _rows(Path(path))]


def _words(value: Any) -> Any:
    """A value with the words for what JSON does not have turned back into floats."""
    if isinstance(value, list):
        return [_words(each) for each in value]
    return _WORDS.get(value, value) if isinstance(value, str) else value


class Bar:
    """The progress of a run, as made by `progress`."""

    def __init__(
        self,
        total: int,
        description: str,
        start: int,
        console: Console,
        every: float,
        clock: Callable[[], float],
    ) -> None:
        self._total, self._description, self._console = total, description, console
        self._every, self._clock = every, clock
        self._seen: deque[tuple[int, float]] = deque(maxlen=_WINDOW)
        self._pending: str | None = None
        self._printed_at: float | None = None
        self._live: Progress | None = None
        if console.is_terminal:
            columns = (
                TextColumn("{task.description}"),
                BarColumn(bar_width=24),
                TextColumn("{task.fields[facts]}"),
            )
            self._live = Progress(*columns, console=console)
            self._task = self._live.add_task(description, total=total, completed=start, facts=f"{start}/{total}")
            self._live.start()

    def update(self, step: int, **facts: Any) -> None:
        """Show that `step` steps are done, with facts: loss=..., tokens_per_second=..., any other number."""
        now = self._clock()
        self._seen.append((step, now))
        parts = [f"{step}/{self._total}", *(_fact(name, value) for name, value in facts.items())]
        left = self.seconds_left()
        if left is not None and step < self._total:
            parts.append(f"{_duration(left)} left")
        text = "  ".join(parts)
        if self._live is not None:
            self._live.update(self._task, completed=step, facts=text)
            return
        first = self._printed_at is None
        if first or step >= self._total or now - (self._printed_at or 0.0) >= self._every:
            self._print(text, now)
        else:
            self._pending = text

    def note(self, text: str) -> None:
        """Print a line of its own, above the bar."""
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def seconds_left(self) -> float | None:
        """Expected time to the last step, at the speed of the latest steps; None before the second update.

        It counts from the first update on, so the compilation in front of it does not enter.
        """
        if len(self._seen) < 2:
            return None
        (step_0, time_0), (step_1, time_1) = self._seen[0], self._seen[-1]
        if step_1 <= step_0:
            return None
        return (self._total - step_1) * (time_1 - time_0) / (step_1 - step_0)

    def close(self) -> None:
        """Stop the bar; the facts of the last update stay on the screen."""
        if self._live is not None:
            self._live.stop()
        elif self._pending is not None:
            self._print(self._pending, self._clock())

    def _print(self, text: str, now: float) -> None:
        self.note(f"{self._description}  {text}")
        self._pending, self._printed_at = None, now


@contextmanager
def progress(
    total_steps: int,
    description: str,
    start: int = 0,
    *,
    console: Console | None = None,
    every_seconds: float = 5.0,
    clock: Callable[[], float] = time.monotonic,
) -> Iterator[Bar]:
    """Show progress while the block runs: a live bar on a terminal, else a plain line now and then.

    Args:
        total_steps: the step at which the run is complete.
        description: what runs, in front of the bar.
        start: steps done before (a resumed run).
        console: None = standard output, of process 0 alone.
        every_seconds: between plain lines; the first and the last update always print.
        clock: seconds, for tests.
    """
    bar = Bar(total_steps, description, start, console or first_console(), every_seconds, clock)
    try:
        yield bar
    finally:
        bar.close()


def _rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """The lines of the file with what they say; without a half line at the end."""
    lines = path.read_bytes().split(b"\n")
    for number, raw in enumerate(lines, start=1):
        if not raw.strip():
            continue
        try:
            line = raw.decode("utf-8")
            row = json.loads(line)
            if not isinstance(row, dict) or not isinstance(row.get("step"), int):
                raise ValueError("no object with a whole number as its step")
        except ValueError as error:
            if number == len(lines):  # no line end after it: the process was killed while it wrote
                return
            raise ValueError(f"{path}:{number}: not a line of metrics ({error}); repair or delete the line") from None
        yield line, row


def _plain(name: str, value: Any) -> Any:
    """A value as JSON can hold it."""
    if hasattr(value, "item") and getattr(value, "size", 1) == 1:
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, (list, tuple)):
        return [_plain(name, each) for each in value]
    raise ValueError(f"metric {name!r}: got {type(value).__name__}, need numbers, text, a boolean or None")


def _fact(name: str, value: Any) -> str:
    if name == "tokens_per_second":
        return f"{float(value):,.0f} tokens/s"
    if name == "mfu":
        return f"MFU {100 * float(value):.1f} %"
    if name == "loss":
        return f"loss {float(value):.4f}"
    shown = value if isinstance(value, (str, int)) else f"{float(value):.4g}"
    return f"{name.replace('_', ' ')} {shown}"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
