"""What Orbax's background tasks log about errors that a save reports already."""

from __future__ import annotations

import logging
import traceback


def drop_reported_errors() -> None:
    """Keep asyncio from logging tracebacks of Orbax's failed writes: `Checkpoints` raises the error as a sentence."""
    logging.getLogger("asyncio").addFilter(_is_news)


def _is_news(record: logging.LogRecord) -> bool:
    """False for the exception of a task of Orbax that nobody awaited, because another one had failed before."""
    error = record.exc_info[1] if record.exc_info else None
    if error is None or not record.getMessage().startswith("Task exception was never retrieved"):
        return True
    return not any("orbax" in frame.filename for frame in traceback.extract_tb(error.__traceback__))
