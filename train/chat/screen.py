"""Answers on the screen, as they come: one, one after the other, or side by side."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

WIDE = 100
"""Columns of a terminal from which on two answers stand side by side."""

_VISIBLE = {code: f"\\x{code:02x}" for code in (*range(9), *range(11, 32), 127)}
"""Control characters, but tab and line feed: a terminal would obey them."""


class Display(Protocol):
    """Where answers appear; `number` counts them from 0."""

    def add(self, number: int, text: str) -> None:
        """Show more of an answer."""

    def end(self, number: int) -> None:
        """Nothing more comes of an answer."""


@contextmanager
def showing(console: Console, titles: Sequence[str]) -> Iterator[Display]:
    """A display for as many answers as there are titles; a single one has none."""
    if len(titles) > 1 and console.is_terminal and console.width >= WIDE:
        columns = SideBySide(titles)
        with Live(columns, console=console, transient=True, refresh_per_second=12):
            yield columns
        console.print(columns)  # whole, where it is longer than the screen
    else:
        yield InTurn(console, titles if len(titles) > 1 else ("",))


class InTurn:
    """Answers one after the other: the later ones wait for the earlier."""

    def __init__(self, console: Console, titles: Sequence[str]) -> None:
        self._console, self._titles = console, titles
        self._waiting = [""] * len(titles)
        self._ended: set[int] = set()
        self._now = 0
        self._begin()

    def add(self, number: int, text: str) -> None:
        """Show more of an answer once it is its turn."""
        self._waiting[number] += text
        if number == self._now:
            self._write()

    def end(self, number: int) -> None:
        """Let the next one have its turn."""
        self._ended.add(number)
        while self._now in self._ended:
            self._write()
            self._print("\n")
            self._now += 1
            if self._now < len(self._titles):
                self._begin()

    def _begin(self) -> None:
        if title := self._titles[self._now]:
            self._console.print(Text(f"{title}:", style="bold"), soft_wrap=True)

    def _write(self) -> None:
        self._print(self._waiting[self._now])
        self._waiting[self._now] = ""

    def _print(self, text: str) -> None:
        shown = visible(text) if self._console.is_terminal else text
        self._console.out(shown, end="", highlight=False)


class SideBySide:
    """Answers in columns."""

    def __init__(self, titles: Sequence[str]) -> None:
        self._titles, self._texts = titles, [""] * len(titles)

    def add(self, number: int, text: str) -> None:
        """Show more of an answer in its column."""
        self._texts[number] += text

    def end(self, number: int) -> None:
        """Its column stays as it is."""

    def __rich__(self) -> Table:
        """The columns so far."""
        table = Table(box=None, expand=True, padding=(0, 2, 0, 0))
        for title in self._titles:
            table.add_column(Text(title, style="bold"), ratio=1, overflow="fold")
        table.add_row(*(Text(visible(text)) for text in self._texts))
        return table


def visible(text: str) -> str:
    """A text whose control characters are spelt out, so that none reaches the terminal."""
    return text.translate(_VISIBLE)
