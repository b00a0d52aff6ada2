"""The engine: one thread that owns the decoder, and through which many clients share it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, replace
from typing import NamedTuple, TypeVar

from jaxsteer.adapters import Adapters
from jaxsteer.inference.scheduling import Limits, Request
from jaxsteer.models.config import check_length
from jaxsteer.models.transformer import Network
from train.serving.jobs import (
    Busy,
    Draining,
    EngineError,
    Job,
    Ledger,
    Listener,
    NonFinite,
    StepFailed,
    Timeout,
)
from train.serving.lineup import Served, UnknownModel
from train.serving.models import Roster
from train.serving.worker import Worker, make_decoder

__all__ = [
    "Busy",
    "Draining",
    "Engine",
    "EngineError",
    "EngineSettings",
    "EngineStats",
    "Job",
    "Listener",
    "NonFinite",
    "StepFailed",
    "Timeout",
]

T = TypeVar("T")


CLIENTS = Limits(max_prompt=1024, max_new_tokens=512, rows=32, chunk=8, prefill_chunk=512, general=True)
"""Limits of a decoder for clients who come and go: a cancelled job has left its row within 8 tokens."""


@dataclass(frozen=True)
class EngineSettings:
    """Sizes of an engine.

    limits  of its decoder; `max_new_tokens` is lowered to the model's context
    queue   jobs that may wait for a row, and calls of `Engine.run` that may wait
    warm    compile all programs before the first job; otherwise each when a job first needs it
    """

    limits: Limits = CLIENTS
    queue: int = 256
    warm: bool = True

    def __post_init__(self) -> None:
        """Reject a queue that there cannot be."""
        if self.queue < 0:
            raise ValueError(f"queue must be at least 0, got {self.queue}")


class EngineStats(NamedTuple):
    """Figures of an engine since its start.

    active         jobs being decoded
    waiting        jobs that wait for a row
    rows           rows allocated
    submitted      jobs accepted
    finished       answers that came to their end
    cancelled      jobs cancelled
    failed         jobs that ended with an error
    prompt_tokens  tokens in the prompts of accepted jobs
    new_tokens     tokens generated
    prefix_hits, prefix_tokens_reused  prompts that began like an earlier one, and their tokens that were not read
                   again, by the present decoder
    restarts       decoders that were replaced after a failed step
    """

    active: int
    waiting: int
    rows: int
    submitted: int
    finished: int
    cancelled: int
    failed: int
    prompt_tokens: int
    new_tokens: int
    prefix_hits: int
    prefix_tokens_reused: int
    restarts: int


class Engine:
    """Answers the requests of many clients with one decoder, on a thread of its own.

    Args:
        roster: the base model and its adapters.
        settings: sizes.
    """

    def __init__(self, roster: Roster, settings: EngineSettings | None = None) -> None:
        self.roster, self.settings = roster, settings or EngineSettings()
        limits, context = self.settings.limits, roster.loaded.config.max_length
        self._limits = replace(limits, max_new_tokens=min(limits.max_new_tokens, context))
        self._ledger = Ledger(limits.rows, self.settings.queue)
        self._worker = Worker(roster, self._limits, self._ledger)
        self._thread = threading.Thread(target=self._worker.serve, name="engine", daemon=True)
        self._door = threading.Lock()  # after `close`, no message follows the last one
        self._changing = threading.Lock()  # adapters are loaded and unloaded one at a time
        self._calls = 0

    @property
    def limits(self) -> Limits:
        """Sizes of the decoder, such as the maximum number of tokens in an answer."""
        return self._limits

    @property
    def draining(self) -> bool:
        """Whether `close` was called."""
        return self._ledger.closed

    def start(self, progress: Callable[[int, int], None] | None = None) -> None:
        """Start the thread; first compile all programs, so that no client waits for that, unless the settings say not.

        Args:
            progress: called as progress(done, total) after each of `total` parts of the work.
        """
        if self.settings.warm:
            self._worker.decoder.warm(progress)
        self._thread.start()

    def close(self, grace: float = 0.0) -> None:
        """Take no more jobs, let the accepted ones go on for up to `grace` seconds, end the rest with `Draining`, and
        end the thread. Not to be called on the engine's thread. A further call may shorten the time."""
        with self._door:
            self._ledger.close()
            self._worker.finish(time.monotonic() + grace)
        if self._thread.ident is None:
            self._worker.serve()  # never started: only to end what was submitted
        else:
            self._thread.join()

    def __enter__(self) -> Engine:
        """The engine, which the end of the block closes."""
        return self

    def __exit__(self, *details: object) -> None:
        """End all jobs and the thread."""
        self.close()

    def submit(self, request: Request, listener: Listener, *, deadline: float | None = None) -> Job:
        """Accept a request, from any thread.

        Args:
            request: `adapter` is that of a `Served`, and `strength` is by the slots of that adapter's own plan
                (`Served.strength`), not of the common one.
            listener: gets its events.
            deadline: `time.monotonic()` at which the job ends with a `Timeout`, waiting or not; None for never.

        Raises:
            Busy: too many jobs wait.
            Draining: the engine is being closed.
            UnknownModel: the adapter was unloaded.
            ValueError: too long for the engine's limits, or a strength for a slot that there is not.
        """
        self._check(request)
        with self._door:
            job = Job(self._ledger.accept(request), request, listener, deadline, self._worker.cancel)
            self._worker.submit(job)
        return job

    def _check(self, request: Request) -> None:
        """Check what can be checked before a request is accepted."""
        lineup = self.roster.lineup
        if all(served.adapter != request.adapter for served in lineup.served.values()):
            raise UnknownModel(f"adapter {request.adapter!r} was unloaded; there are {', '.join(lineup.served)}")
        lineup.translated(request)
        self._limits.check(request)
        check_length(self.roster.loaded.config, len(request) + request.max_new_tokens, request.prompt.source)

    def run(self, work: Callable[[Network, Adapters | None], T]) -> Future[T]:
        """Call `work(network, adapters)` on a thread beside the engine's, one call at a time, while decoding goes on.

        Args:
            work: gets the model with all its weights, and the adapters stacked in them (None before there are any), as
                earlier loads left them.

        Returns:
            Its result or exception; a future that is cancelled before its turn is not called.

        Raises:
            Busy: too many calls wait.
            Draining: the engine is being closed.
        """
        future: Future[T] = Future()
        with self._door:
            self._refuse_if_closed()
            if self._calls >= max(1, self.settings.queue):
                raise Busy(f"the queue is full: {self._calls} calls wait already", retry_after=1)
            self._calls += 1
            self._worker.call(work, future)
        future.add_done_callback(self._called)
        return future

    def _called(self, future: Future) -> None:
        with self._door:
            self._calls -= 1

    def _refuse_if_closed(self) -> None:
        if self._ledger.closed:
            raise Draining("the server is shutting down and takes no more requests")

    def load(self, name: str, path: str) -> Served:
        """Read a steering file and serve it under a name, while other jobs go on; it blocks the calling thread only,
        until the engine's thread has taken it over.

        Nothing is compiled again if its slots have a place in the common plan. Otherwise all adapters are stacked anew,
        with another decoder: its programs are compiled first, then new jobs wait until the running ones have ended.

        Raises:
            Refused: see `Roster.read`; or there is no place left.
            Draining: the engine is being closed.
        """
        with self._changing:
            candidate = self.roster.read(name, path)
            lineup = self.roster.with_candidate(candidate, self._ledger.in_use)
            decoder, present = None, self.roster.adapters
            assert lineup.adapters is not None
            if present is None or present.plan != lineup.adapters.plan:
                decoder = make_decoder(self.roster, lineup.adapters, self._limits)
                if self.settings.warm:
                    decoder.warm()
            adopted: Future[None] = Future()
            with self._door:
                self._refuse_if_closed()
                self._worker.adopt(lineup, decoder, adopted)
            adopted.result()
            return self.roster.get(name)

    def unload(self, name: str) -> None:
        """Stop serving an adapter. Jobs that were accepted before finish with it; its place is free after the last.

        Raises:
            UnknownModel: there is no such adapter.
            Refused: it is the base model.
        """
        with self._changing:
            self.roster.lineup = self.roster.without(name)

    def stats(self) -> EngineStats:
        """Figures of now, from any thread."""
        decoder, counts, jobs = self._worker.decoder, self._ledger.counts, self._ledger.open_jobs
        active = min(jobs, decoder.active)
        return EngineStats(
            active=active,
            waiting=jobs - active,
            rows=decoder.rows,
            prefix_hits=decoder.prefix_hits,
            prefix_tokens_reused=decoder.prefix_tokens_reused,
            restarts=self._worker.restarts,
            **vars(counts),
        )
