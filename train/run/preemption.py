"""Requests to stop (SIGTERM, Ctrl-C), which the training loop checks at every step."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import jax
from jax.experimental import multihost_utils


class Preemption:
    """Whether the run has been asked to stop; made by `preemption`."""

    def __init__(self) -> None:
        self.signal: str | None = None
        """Name of the signal received, None so far. Stays None under `jax.distributed`."""

    def requested(self, step: int) -> bool:
        """Whether to save and stop after this step; several processes get True at the same step.

        Args:
            step: the step's number; every process must ask once per step.
        """
        if jax.distributed.is_initialized():
            return bool(multihost_utils.reached_preemption_sync_point(step))
        return self.signal is not None


@contextmanager
def preemption() -> Iterator[Preemption]:
    """While the block runs, SIGTERM and Ctrl-C only request a stop; a second Ctrl-C stops at once.

    Under `jax.distributed` no handler is set: JAX's own catches SIGTERM and agrees on a step between processes;
    ours would disable it.
    """
    flag = Preemption()

    def handle(number: int, frame: FrameType | None) -> None:
        if flag.signal is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        flag.signal = signal.Signals(number).name

    # Python lets only the main thread set handlers.
    ours = threading.current_thread() is threading.main_thread() and not jax.distributed.is_initialized()
    numbers = (signal.SIGTERM, signal.SIGINT) if ours else ()
    previous = {number: signal.signal(number, handle) for number in numbers}
    try:
        yield flag
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
