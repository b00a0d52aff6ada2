"""What a task tells the user about its data, on standard error."""

from __future__ import annotations

from functools import cache

from train.display.console import say


@cache
def say_once(text: str) -> None:
    """Print a line, unless this process has: a file may be read more than once."""
    say(text)
