"""What Orbax's background tasks print about errors that a save reports already."""

from __future__ import annotations

import logging
import sys
import traceback
from collections.abc import Callable
from typing import Any


def drop_reported_errors() -> None:
    """Let failed writes of Orbax print no traceback: `Checkpoints` raises the error as a sentence."""
    logging.getLogger("asyncio").addFilter(_is_news)
    if not isinstance(sys.unraisablehook, _Hook):
        sys.unraisablehook = _Hook(sys.unraisablehook)


class _Hook:
    """Shows errors that cannot be raised, except for a write that finds the event loop of a failed save closed."""

    def __init__(self, show: Callable[[Any], object]) -> None:
        self._show = show

    def __call__(self, unraisable: Any) -> None:
        """Show it, if it is news."""
        frames = traceback.extract_tb(unraisable.exc_traceback)
        in_asyncio = bool(frames) and all("asyncio" in frame.filename for frame in frames)
        if not (in_asyncio and str(unraisable.exc_value) == "Event loop is closed"):
            self._show(unraisable)


def _is_news(record: logging.LogRecord) -> bool:
    """False for the exception of a task of Orbax that nobody awaited, because another one had failed before."""
    error = record.exc_info[1] if record.exc_info else None
    if error is None or not record.getMessage().startswith("Task exception was never retrieved"):
        return True
    return not any("orbax" in frame.filename for frame in traceback.extract_tb(error.__traceback__))
