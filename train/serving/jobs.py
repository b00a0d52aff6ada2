"""Jobs of an engine: accepted requests, why they may fail, and how many there are."""

from __future__ import annotations

import math
import threading
import time
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, replace

from jaxsteer.inference.events import Event
from jaxsteer.inference.scheduling import Request

RECENT = 64
"""Jobs by whose ends the time until there is room is estimated."""
LONGEST_RETRY = 60
"""Seconds after which a client may try again, at most."""


class EngineError(Exception):
    """Why a job got no answer, or not all of one."""


class Busy(EngineError):
    """The queue is full.

    Attributes:
        retry_after: seconds after which there should be room, 1 to 60, judged by the jobs that ended last.
    """

    def __init__(self, message: str, retry_after: int) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class Draining(EngineError):
    """The engine is being closed and takes no more jobs, or was closed before this one had ended."""


class Timeout(EngineError):
    """A job's deadline passed before its answer had ended."""


class NonFinite(EngineError):
    """The model gave logits that are not finite; the text names likely causes."""


class StepFailed(EngineError):
    """Decoding failed for all jobs at once, for instance for lack of memory; the engine goes on without them."""


Listener = Callable[[Event | EngineError], None]
"""Gets a job's events, the last of which has `finished`, or an error, which is the last. It is called on the engine's
thread, must not block, and must not raise."""


class Job:
    """A request that was accepted.

    Attributes:
        id: 0, 1, 2, ...; also that of its events.
    """

    def __init__(
        self, id: int, request: Request, listener: Listener, deadline: float | None, leave: Callable[[Job], None]
    ) -> None:
        self.id, self.deadline = id, deadline
        self.request: Request | None = request  # until it ends
        self.cancelled = False
        self._listener: Listener | None = listener
        self._leave: Callable[[Job], None] | None = leave

    def cancel(self) -> None:
        """End the job from any thread; its row is free after the current chunk. Does nothing once it has ended.

        No event is delivered after the call, except for one that is being delivered meanwhile.
        """
        leave, self._leave, self._listener = self._leave, None, None
        if leave is not None:
            self.cancelled = True
            leave(self)

    def tell(self, news: Event | EngineError) -> None:
        """Deliver news, on the engine's thread, unless the job was cancelled."""
        if (listener := self._listener) is not None:
            listener(news)

    def release(self) -> None:
        """Let go of everything that a job which has ended needs no more: its client may keep it."""
        self.request = self._listener = self._leave = None


@dataclass(frozen=True)
class Counts:
    """Numbers of jobs and tokens since an engine's start; see `EngineStats`."""

    submitted: int = 0
    finished: int = 0
    cancelled: int = 0
    failed: int = 0
    prompt_tokens: int = 0
    new_tokens: int = 0


class Ledger:
    """Counts the jobs that were accepted and have not ended, on any thread.

    Args:
        rows: jobs decoded at a time.
        queue: jobs that may wait besides.
    """

    def __init__(self, rows: int, queue: int) -> None:
        self._room, self._queue = rows + queue, queue
        self._lock = threading.Lock()
        self._using: Counter[str | int | None] = Counter()  # jobs of each adapter
        self._ends: deque[float] = deque(maxlen=RECENT)
        self._closed = False
        self.counts = Counts()

    @property
    def open_jobs(self) -> int:
        """Number of jobs that have not ended."""
        with self._lock:
            return self._using.total()

    @property
    def closed(self) -> bool:
        """Whether no more jobs are accepted."""
        return self._closed

    def in_use(self, adapter: str) -> bool:
        """Whether an adapter has jobs."""
        with self._lock:
            return self._using[adapter] > 0

    def accept(self, request: Request) -> int:
        """Count one more job.

        Returns:
            Its id.

        Raises:
            Draining: no more are accepted.
            Busy: there are too many.
        """
        with self._lock:
            if self._closed:
                raise Draining("the server is shutting down and takes no more requests")
            if self._using.total() >= self._room:
                raise Busy(f"the queue is full: {self._queue} requests wait already", self._retry_after())
            self._using[request.adapter] += 1
            counts = self.counts
            read = counts.prompt_tokens + len(request)
            self.counts = replace(counts, submitted=counts.submitted + 1, prompt_tokens=read)
            return counts.submitted

    def ended(self, request: Request, how: str) -> None:
        """Count one job fewer; `how` is a field of `Counts`."""
        with self._lock:
            self._using -= Counter([request.adapter])  # drops what reaches zero
            self._ends.append(time.monotonic())
            self.counts = replace(self.counts, **{how: getattr(self.counts, how) + 1})

    def generated(self, tokens: int) -> None:
        """Count new tokens."""
        with self._lock:
            self.counts = replace(self.counts, new_tokens=self.counts.new_tokens + tokens)

    def close(self) -> None:
        """Accept no more jobs."""
        with self._lock:
            self._closed = True

    def _retry_after(self) -> int:
        """Seconds in which half the queue should be done, at the rate of the jobs that ended in the last minute."""
        now = time.monotonic()
        recent = [end for end in self._ends if now - end <= LONGEST_RETRY]
        if not recent:
            return 1
        each = (now - recent[0]) / len(recent)
        return max(1, min(LONGEST_RETRY, math.ceil(each * self._queue / 2)))
