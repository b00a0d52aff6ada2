"""The console: progress bars and aligned facts, printed by process 0 alone."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import SupportsFloat

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn

from train.devices.processes import is_first


def print_facts(facts: Mapping[str, str]) -> None:
    """Print one aligned line per fact."""
    width = max(map(len, facts))
    for name, value in facts.items():
        get_console().print(f"[bold]{name:<{width}}[/bold]  {escape(value)}", soft_wrap=True, highlight=False)


def say(text: str, *, stderr: bool = True) -> None:
    """Print a sentence for a person as it is, on one line if the terminal has room; the first process only."""
    get_console(stderr=stderr).print(text, highlight=False, markup=False, soft_wrap=True)


Fact = str | SupportsFloat
"""The value of a fact: text, or a number (a JAX scalar too)."""

_WINDOW = 32  # number of updates that the speed is averaged over


class Bar:
    """A progress bar, as made by `progress`."""

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

    def update(self, step: int, **facts: Fact) -> None:
        """Show that `step` steps are done, with facts such as loss=..., tokens_per_second=... or any other number."""
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

    def skip(self, step: int) -> None:
        """Show that `step` steps are done, some of them made before: the speed is that of later ones."""
        self._seen.clear()
        self.update(step)

    def expect(self, total: int) -> None:
        """Change the number of steps, where it was an estimate."""
        self._total = total
        if self._live is not None:
            self._live.update(self._task, total=total)

    def note(self, text: str) -> None:
        """Print a separate line above the bar."""
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def seconds_left(self) -> float | None:
        """Estimated time to the last step, at the speed of the latest steps; None before the second update.

        Time before the first update, such as compilation, is not counted.
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
    """Show progress while the block runs: a live bar on a terminal, otherwise a plain line now and then.

    Args:
        total_steps: number of steps at which the bar is full.
        description: text in front of the bar.
        start: number of steps done before, in a resumed run.
        console: where to print; None = standard output of process 0.
        every_seconds: minimum time between plain lines; the first and the last update always print.
        clock: returns the time in seconds; replaced in tests.
    """
    bar = Bar(total_steps, description, start, console or get_console(), every_seconds, clock)
    try:
        yield bar
    finally:
        bar.close()


def _fact(name: str, value: Fact) -> str:
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


def get_console(*, stderr: bool = False) -> Console:
    """The console; prints on process 0 only."""
    return Console(quiet=not is_first(), stderr=stderr)
