"""A profiler trace of some steps of a run."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType
from typing import Any

import jax

from train.config import parse_steps
from train.devices.processes import is_first
from train.display.console import get_console


class Profiler:
    """Traces the steps asked for into a folder, on process 0. A context manager: a trace under way ends with it.

    Args:
        text: as `parse_steps` reads it.
        folder: of the traces.
        start: steps done before (a resumed run). steps: the last step.

    Raises:
        ValueError: steps that this run does not do.
    """

    def __init__(self, text: str | None, folder: Path, start: int, steps: int) -> None:
        self._steps, self._folder, self._active = parse_steps(text), folder, False
        if self._steps and not (start < self._steps[0] and self._steps[-1] <= steps):
            raise ValueError(f"profile {text}: this run does steps {start + 1} to {steps}; choose among those")

    def before(self, step: int) -> None:
        """Begin the trace where this is the first of its steps."""
        if self._steps and step == self._steps[0] and is_first():
            jax.profiler.start_trace(str(self._folder))
            self._active = True

    def after(self, step: int, state: Any) -> str | None:
        """End the trace where this was the last of its steps; returns what to tell the person."""
        if not self._active or step != self._steps[-1]:
            return None
        jax.block_until_ready(state)
        self._stop()
        return (
            f"Traced steps {self._steps[0]} to {self._steps[-1]} into {self._folder}. To look at it: "
            f"pip install xprof, then xprof --logdir {self._folder}"
        )

    def __enter__(self) -> Profiler:
        """The profiler itself."""
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        """End a trace that an early stop left under way."""
        if self._active:
            self._stop()
            get_console().print(f"The trace in {self._folder} ends before step {self._steps[-1]}: the run stopped.")

    def _stop(self) -> None:
        self._active = False
        jax.profiler.stop_trace()
