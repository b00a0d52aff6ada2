"""Other programs as processes: started in a session of their own, and ended with all that they started."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import IO, Any, NamedTuple

from train.devices import interrupts


class TookTooLong(ValueError):
    """A program gave no answer in time, so it was stopped."""


class Finished(NamedTuple):
    """How a program ended.

    status     0 if it succeeded; negative: the signal that ended it
    printed    on its standard output
    complaint  on its standard error
    """

    status: int
    printed: str
    complaint: str


@contextmanager
def started(
    command: Sequence[str],
    name: str,
    stderr: IO | int,
    folder: str | None,
    environment: Mapping[str, str],
    stdout: IO | int = subprocess.PIPE,
) -> Iterator[subprocess.Popen]:
    """A process that runs a command in a folder; killed at the end with all that it started, if it still runs.

    Args:
        command: the program and its arguments.
        name: what messages call it.
        stderr: where its standard error goes.
        folder: to run in; None = this process's.
        environment: its environment variables.
        stdout: where its standard output goes; by default to the reader of the process.

    Raises:
        ValueError: it cannot be run.
    """
    streams: Any = {"stdin": subprocess.PIPE, "stdout": stdout, "stderr": stderr}
    try:
        process = subprocess.Popen(command, **streams, cwd=folder, env=environment, start_new_session=True)
    except OSError as error:
        raise ValueError(f"{name}: {command[0]} cannot be run ({error.strerror})") from None
    try:
        with interrupts.undoing(lambda: os.killpg(process.pid, signal.SIGKILL)):
            yield process
    finally:
        if process.poll() is None:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            with suppress(BrokenPipeError):
                process.communicate()


def run_program(
    command: Sequence[str],
    text: str,
    name: str,
    timeout: float | None,
    folder: str | None,
    environment: Mapping[str, str],
) -> Finished:
    """Run a command with a text on standard input to its end.

    Args:
        command: as for `started`; so are `name`, `folder` and `environment`.
        text: for its standard input.
        timeout: seconds after which it is stopped; None = never.

    Raises:
        TookTooLong: it was stopped.
        ValueError: it cannot be run.
    """
    with started(command, name, subprocess.PIPE, folder, environment) as process:
        try:
            printed, complaint = process.communicate(text.encode(), timeout)
        except subprocess.TimeoutExpired:
            raise TookTooLong(f"{name}: no answer within {timeout:g} seconds, so it was stopped") from None
    return Finished(process.returncode, printed.decode(errors="replace"), complaint.decode(errors="replace"))
