"""Ctrl-C in a chat: it stops an answer or a command, not the chat."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType


class CtrlC:
    """What Ctrl-C does; outside `handled`, whatever it did before."""

    def __init__(self) -> None:
        self._action: Callable[[], object] | None = None

    @contextmanager
    def handled(self) -> Iterator[None]:
        """Raise KeyboardInterrupt at Ctrl-C while the block runs, or do what `calling` says.

        The model computes on other threads, so that the exception cannot disturb it.
        """
        before = signal.getsignal(signal.SIGINT)
        if threading.current_thread() is not threading.main_thread() or before is signal.SIG_IGN:
            yield
            return
        signal.signal(signal.SIGINT, self._interrupt)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)

    @contextmanager
    def calling(self, action: Callable[[], object]) -> Iterator[None]:
        """Call `action`, which must be one that a signal handler may, instead of raising an exception."""
        self._action = action
        try:
            yield
        finally:
            self._action = None

    def _interrupt(self, number: int, frame: FrameType | None) -> None:
        if self._action is None:
            raise KeyboardInterrupt
        self._action()
