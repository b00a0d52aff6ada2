"""A profiler trace of some steps of a run."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType
from typing import Any

import jax

from train.config import parse_steps
from train.devices.processes import is_first
from train.display.console import get_console


def check_profile(text: str | None, start: int, steps: int) -> None:
    """Raise ValueError for steps that a run does not do; see `Profiler`."""
    traced = parse_steps(text)
    if traced and not (start < traced[0] and traced[-1] <= steps):
        raise ValueError(f"profile {text}: this run does steps {start + 1} to {steps}; choose from those")


class Profiler:
    """Traces some steps into a folder, on process 0. A context manager: leaving it ends a trace in progress.

    Args:
        text: which steps, see `train.config.parse_steps`.
        folder: where the traces go.
        start: steps done before (a resumed run).
        steps: the last step.

    Raises:
        ValueError: steps that this run does not do.
    """

    def __init__(self, text: str | None, folder: Path, start: int, steps: int) -> None:
        check_profile(text, start, steps)
        self._steps, self._folder, self._active = parse_steps(text), folder, False

    def before(self, step: int) -> None:
        """Start the trace if this is its first step."""
        if self._steps and step == self._steps[0] and is_first():
            jax.profiler.start_trace(str(self._folder))
            self._active = True

    def after(self, step: int, state: Any) -> str | None:
        """End the trace if this was its last step; returns a message for the user."""
        if not self._active or step != self._steps[-1]:
            return None
        jax.block_until_ready(state)
        self._stop()
        return (
            f"Traced steps {self._steps[0]} to {self._steps[-1]} into {self._folder}. To view it: "
            f"pip install xprof, then xprof --logdir {self._folder}"
        )

    def __enter__(self) -> Profiler:
        """The profiler itself."""
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        """End a trace that an early stop left in progress."""
        if self._active:
            self._stop()
            get_console().print(f"The trace in {self._folder} ends before step {self._steps[-1]}: the run stopped.")

    def _stop(self) -> None:
        self._active = False
        jax.profiler.stop_trace()
