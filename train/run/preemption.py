"""Requests to stop (SIGTERM, Ctrl-C), which the training loop checks at every step."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import jax
from jax.experimental import multihost_utils

from train.devices import interrupts


class Preemption:
    """Whether the run has been asked to stop; made by `preemption`."""

    @property
    def signal(self) -> str | None:
        """Name of the signal received, None so far. Stays None under `jax.distributed`."""
        return interrupts.requested()

    def requested(self, step: int) -> bool:
        """Whether to save and stop after this step; several processes get True at the same step.

        Args:
            step: the step's number; every process must ask once per step.
        """
        interrupts.wait()  # from now on there is a step to save
        if jax.distributed.is_initialized():
            return bool(multihost_utils.reached_preemption_sync_point(step))
        return self.signal is not None


@contextmanager
def preemption() -> Iterator[Preemption]:
    """While the block runs, SIGTERM and Ctrl-C only request a stop; a second Ctrl-C stops at once.

    In a command Ctrl-C is handled by `train.devices.interrupts`; elsewhere, as in a notebook, the second one raises
    KeyboardInterrupt. Under `jax.distributed` SIGTERM has no handler of ours, which would disable JAX's own: that one
    agrees on a step between processes.
    """

    def handle(number: int, frame: FrameType | None) -> None:
        if interrupts.requested() is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        interrupts.request(signal.Signals(number).name)

    # Python lets only the main thread set handlers.
    ours = threading.current_thread() is threading.main_thread() and not jax.distributed.is_initialized()
    numbers = [signal.SIGTERM] if ours else []
    if ours and not interrupts.is_handled() and signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        numbers.append(signal.SIGINT)
    previous = {number: signal.signal(number, handle) for number in numbers}
    try:
        with interrupts.block("soon"):
            yield Preemption()
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
        if not interrupts.is_handled():  # a command is about to end, and what follows is to hear of it
            interrupts.request(None)
