"""What a task tells the user about its data, on standard error."""

from __future__ import annotations

from functools import cache

from rich.text import Text

from train.display.console import get_console


def say(text: str) -> None:
    """Print a line as it is, on process 0."""
    get_console(stderr=True).print(Text(text), soft_wrap=True)


@cache
def say_once(text: str) -> None:
    """Print a line, unless this process has: a file may be read more than once."""
    say(text)
