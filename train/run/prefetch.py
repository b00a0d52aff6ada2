"""Batches made and placed on the devices in the background, while earlier steps run."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from queue import Full, Queue
from types import TracebackType
from typing import Generic, TypeVar

DEPTH = 2
"""Batches that wait for their step, at most."""

_POLL_SECONDS = 0.1

B = TypeVar("B")


@dataclass
class Prefetch(Generic[B]):
    """The batches of successive steps, in order. A context manager, whose end stops the work.

    A batch is what `make` gives for its step, whenever it is made; an error of `make` is raised for the step that needs
    the batch.

    make   makes the batch of a step, in a thread of its own
    steps  the steps, from the next one to the last
    """

    make: Callable[[int], B]
    steps: range
    waited: float = 0.0
    """Seconds that the last `take` waited."""
    _ready: Queue[tuple[int, B | None, BaseException | None]] = field(init=False, repr=False)
    _stop: threading.Event = field(init=False, repr=False, default_factory=threading.Event)
    _thread: threading.Thread = field(init=False, repr=False)

    def __post_init__(self) -> None:
        """Prepare the thread, which `__enter__` starts."""
        self._ready = Queue(DEPTH)
        self._thread = threading.Thread(target=self._work, name="batches", daemon=True)

    def __enter__(self) -> Prefetch[B]:
        """Begin with the first step."""
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop, and wait until the batch being made is made."""
        self._stop.set()
        self._thread.join()

    def take(self, step: int) -> B:
        """The batch of the next step; waits for it.

        Args:
            step: the successor of the last one taken.

        Raises:
            Exception: what making this batch raised.
        """
        began = time.perf_counter()
        found, batch, error = self._ready.get()
        self.waited = time.perf_counter() - began
        if error is not None:
            raise error
        if found != step:
            raise ValueError(f"prefetch: the next step is {found}, asked for {step}")
        return batch  # type: ignore[return-value]  # there is one where there is no error

    def _work(self) -> None:
        for step in self.steps:
            try:
                made = step, self.make(step), None
            except BaseException as error:  # whatever it is, it belongs to the step that needs the batch
                self._put((step, None, error))
                return
            if not self._put(made):
                return

    def _put(self, item: tuple[int, B | None, BaseException | None]) -> bool:
        """Hand over a batch as soon as there is room; False if that is no longer asked for."""
        while not self._stop.is_set():
            try:
                self._ready.put(item, timeout=_POLL_SECONDS)
            except Full:
                continue
            return True
        return False
