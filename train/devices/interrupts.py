"""Ctrl-C: noticed at once whatever the main thread computes, and obeyed where nothing is lost.

An exception raised by a signal handler appears anywhere in the program: inside a callback of JAX it is swallowed, and
while a computation is running it can end in a crash. So the handler does nothing. The signal also arrives in a pipe
that a thread reads, and the thread either ends the process or sets a flag that loops ask for at their safe points.

This module imports nothing heavy: a command installs it before it imports JAX.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from types import FrameType
from typing import Literal

STOPPED = 130
"""Exit status of a command that Ctrl-C ended: 128 + SIGINT."""

GRACE_SECONDS = 2.0
"""How long a block that loses nothing by being ended has to reach a safe point."""

Block = Literal["at once", "soon", "wait"]
"""What Ctrl-C does during a block: end the process; end it after `GRACE_SECONDS` unless there is a safe point before;
or wait for a safe point, however long it takes."""


class Interrupted(KeyboardInterrupt):
    """Raised at a safe point after a request to stop; the text says what was kept."""


@dataclass
class _State:
    """The request to stop, if any, and how it is obeyed. There is one process, hence one state."""

    signal: str | None = None
    block: Block = "at once"
    deferred: bool = False
    handled: bool = False
    joined: bool = False
    last: bool = False
    undone: list[Callable[[], object]] = field(default_factory=list)


_state = _State()


def requested() -> str | None:
    """Name of the signal that asked this process to stop; None so far."""
    return _state.signal


def request(name: str | None) -> None:
    """Note that a signal asked this process to stop; None takes it back."""
    _state.signal = name


def is_handled() -> bool:
    """Whether Ctrl-C is handled by this module."""
    return _state.handled


def joined() -> None:
    """Note that this process is one of several: they stop together, or not at a safe point."""
    _state.joined = True


def last() -> None:
    """Note that the process ends with the block that handles Ctrl-C, so that what runs at its exit is not disturbed."""
    _state.last = True


def safe_point(kept: str = "") -> None:
    """Leave here if this process was asked to stop.

    Args:
        kept: a sentence on what is not lost.

    Raises:
        Interrupted: it was.
    """
    if _state.signal is not None and not _state.deferred and not _state.joined:
        raise Interrupted(kept)


@contextmanager
def block(kind: Block) -> Iterator[None]:
    """Say what Ctrl-C does while the block runs. A block inside another one that waits does too."""
    before = _state.block
    _state.block = "wait" if before == "wait" else kind
    try:
        yield
    finally:
        _state.block = before


def wait() -> None:
    """Let Ctrl-C wait for a safe point in the rest of the innermost block."""
    _state.block = "wait"


@contextmanager
def deferred() -> Iterator[None]:
    """Finish the block although this process was asked to stop: its safe points are none."""
    before, _state.deferred = _state.deferred, True
    try:
        yield
    finally:
        _state.deferred = before


@contextmanager
def undoing(action: Callable[[], object]) -> Iterator[None]:
    """Call `action`, which must be quick, if the process is ended while the block runs."""
    _state.undone.append(action)
    try:
        yield
    finally:
        _state.undone.remove(action)


@contextmanager
def handling() -> Iterator[None]:
    """Handle Ctrl-C in this process while the block runs: what every command does.

    Does nothing where it is handled already, where Ctrl-C is ignored (a job in the background), and outside the main
    thread, which alone may set handlers.
    """
    current = signal.getsignal(signal.SIGINT)
    main = threading.current_thread() is threading.main_thread()
    if _state.handled or not main or current is signal.SIG_IGN:
        yield
        return
    read_end, write_end = os.pipe()
    os.set_blocking(write_end, False)

    def handler(number: int, frame: FrameType | None) -> None:
        # Another library may have put its own pipe in the place of ours, which then has not heard of it.
        if signal.set_wakeup_fd(write_end, warn_on_full_buffer=False) != write_end:
            _interrupt()

    def listen() -> None:
        while number := os.read(read_end, 1)[0]:
            if number == signal.SIGINT and signal.getsignal(signal.SIGINT) is handler:
                _interrupt()
        os.close(read_end)

    wakeup = signal.set_wakeup_fd(write_end, warn_on_full_buffer=False)
    signal.signal(signal.SIGINT, handler)
    threading.Thread(target=listen, name="interrupts", daemon=True).start()
    _state.handled = True
    try:
        yield
    finally:
        _state.handled = False
        # At exit an exception would be a traceback from JAX. What asked to stop has saved; anything else just ends.
        end = signal.SIG_DFL if _state.signal is None else signal.SIG_IGN
        signal.signal(signal.SIGINT, end if _state.last else current)
        signal.set_wakeup_fd(wakeup)
        os.write(write_end, b"\0")
        os.close(write_end)


def _interrupt() -> None:
    """Obey one Ctrl-C."""
    if _state.signal is not None or _state.block == "at once" or (_state.joined and _state.block != "wait"):
        _say("Interrupted.")
        leave(STOPPED)
    if _state.joined:
        os.kill(os.getpid(), signal.SIGTERM)  # which JAX answers by having all processes stop after the same step
    _state.signal = signal.SIGINT.name
    _say("Stopping at the next safe point; press Ctrl-C again to quit at once.")
    if _state.block == "soon":
        timer = threading.Timer(GRACE_SECONDS, leave, (STOPPED,))
        timer.daemon = True
        timer.start()


def leave(status: int) -> None:
    """End the process now: nothing is waited for, neither computations nor threads, nor what runs at exit.

    What was written is in the files: only what Python holds back for standard output and standard error is written, and
    what `undoing` registered is called.
    """
    for action in reversed(_state.undone):
        with suppress(Exception):
            action()
    flushing = threading.Thread(target=_flush, daemon=True)
    flushing.start()
    flushing.join(1.0)  # the main thread may hold their locks
    os._exit(status)


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        with suppress(Exception):
            if stream.isatty():
                stream.write("\x1b[?25h")  # the cursor, which a progress bar hides
            stream.flush()


def _say(text: str) -> None:
    """Print a line on standard error, past what the main thread is writing there."""
    with suppress(OSError):
        os.write(2, f"\n{text}\n".encode())
