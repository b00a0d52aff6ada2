"""What the engine's thread does: it alone calls the decoder."""

from __future__ import annotations

import logging
import queue
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

from jaxsteer.adapters import Adapters
from jaxsteer.inference.decoder import Decoder
from jaxsteer.inference.events import Event
from jaxsteer.inference.scheduling import Limits, nonfinite_logits
from jaxsteer.models.transformer import Model, Network
from train.serving.jobs import Draining, EngineError, Job, Ledger, NonFinite, StepFailed, Timeout
from train.serving.lineup import Lineup
from train.serving.models import Roster

_log = logging.getLogger("jaxsteer.serving")


def make_network(roster: Roster, adapters: Adapters | None) -> Network:
    """The base model with stacked adapters, or alone."""
    loaded = roster.loaded
    if adapters is None:
        return Network(Model(loaded.config), loaded.base, {})
    return Network(Model(loaded.config, adapters.plan), loaded.base, adapters.steering)


def make_decoder(roster: Roster, adapters: Adapters | None, limits: Limits) -> Decoder:
    """A decoder of the same."""
    network = make_network(roster, adapters)
    return Decoder(network.model, network.base, {} if adapters is None else adapters, limits)


@dataclass(frozen=True)
class _Call:
    """Work for the engine's thread, and the future of its result."""

    work: Callable[[Network, Adapters | None], Any]
    future: Future

    def __call__(self, network: Network, adapters: Adapters | None) -> None:
        if not self.future.set_running_or_notify_cancel():
            return
        try:
            self.future.set_result(self.work(network, adapters))
        except BaseException as error:
            self.future.set_exception(error)


@dataclass(frozen=True)
class _Successor:
    """A decoder for other adapters, which takes over once the present one has nothing to do."""

    decoder: Decoder
    lineup: Lineup
    future: Future


class Worker:
    """The engine's thread. `submit`, `cancel`, `call`, `adopt` and `finish` are for other threads; they only leave
    messages.

    Args:
        roster: the base model and its adapters.
        limits: of the decoder.
        ledger: counts jobs.
    """

    def __init__(self, roster: Roster, limits: Limits, ledger: Ledger) -> None:
        self.roster, self.limits, self.ledger = roster, limits, ledger
        self.decoder = make_decoder(roster, roster.adapters, limits)
        self.restarts = 0
        self._messages: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._jobs: dict[int, Job] = {}  # by the decoder's ids
        self._held: deque[Job] = deque()  # while another decoder is to take over
        self._calls: deque[_Call] = deque()
        self._successor: _Successor | None = None
        self._leave_at = float("inf")  # time.monotonic() at which to leave, whatever is unfinished

    # ---- messages from other threads

    def submit(self, job: Job) -> None:
        """Decode a job."""
        self._messages.put(lambda: self._admit(job))

    def cancel(self, job: Job) -> None:
        """Free a cancelled job's row."""
        self._messages.put(lambda: self._remove(job))

    def call(self, work: Callable[[Network, Adapters | None], Any], future: Future) -> None:
        """Call work between two steps."""
        self._messages.put(lambda: self._calls.append(_Call(work, future)))

    def adopt(self, lineup: Lineup, decoder: Decoder | None, future: Future) -> None:
        """Go on with other adapters; with a decoder of their own once the present one is done, if one is given."""
        if decoder is None:
            self._messages.put(lambda: self._swap(lineup, future))
        else:
            self._messages.put(lambda: self._succeed_with(_Successor(decoder, lineup, future)))

    def finish(self, end: float) -> None:
        """Leave once all is done, or at `end` of `time.monotonic()`; of several calls, the earliest time counts."""

        def note() -> None:
            self._leave_at = min(self._leave_at, end)

        self._messages.put(note)

    # ---- the thread

    def serve(self) -> None:
        """Work until `finish`."""
        while True:
            try:
                self._receive()
                if self._may_leave():
                    break
                self._round()
            except Exception as error:
                _log.exception("decoding failed; its jobs end, and others are decoded afresh")
                self._restart(error)
        self._refuse_rest()

    def _receive(self) -> None:
        """Obey all messages; with nothing else to do, wait for one."""
        idle = not (self._jobs or self._calls or self._successor or self._may_leave())
        if idle:
            self._messages.get()()
        while not self._messages.empty():
            self._messages.get()()

    def _may_leave(self) -> bool:
        left = self._jobs or self._held or self._calls or self._successor
        return self.ledger.closed and self._leave_at < float("inf") and (not left or time.monotonic() >= self._leave_at)

    def _round(self) -> None:
        """One chunk of decoding, and one of the calls that wait."""
        self._expire()
        if self._calls:
            adapters = self.roster.adapters
            self._calls.popleft()(make_network(self.roster, adapters), adapters)
        for event in self.decoder.step():
            self._deliver(event)
        if self._successor and not self._jobs:
            self._hand_over()

    def _admit(self, job: Job) -> None:
        if job.request is None or job.cancelled:
            return  # its cancellation is a later message
        if self._successor:
            self._held.append(job)
            return
        try:
            id = self.decoder.submit(self.roster.lineup.translated(job.request))
        except Exception as error:  # the fault of this job alone
            self._end_job(job, "failed", EngineError(str(error)))
        else:
            self._jobs[id] = job

    def _deliver(self, event: Event) -> None:
        """Tell a job's listener."""
        job = self._jobs.get(event.id)
        if job is None or job.request is None:
            return  # it has left
        self.ledger.generated(len(event.tokens))
        if event.finished:
            del self._jobs[event.id]
        if event.finished == "nonfinite":
            error = nonfinite_logits(job.request.prompt, self.roster.loaded.config.vocab_size)
            self._end_job(job, "failed", NonFinite(str(error)))
        elif event.finished:
            self._end_job(job, "finished", event._replace(id=job.id))
        else:
            self._tell(job, event._replace(id=job.id))

    def _tell(self, job: Job, news: Event | EngineError) -> None:
        """Call a job's listener, whose failure is its own."""
        try:
            job.tell(news)
        except Exception:
            _log.exception("a listener failed; its job is cancelled")
            job.cancel()

    def _end_job(self, job: Job, how: str, news: Event | EngineError | None = None) -> None:
        """Count a job that the decoder does not have any more as ended, and then tell it why."""
        if job.request is None:
            return
        self.ledger.ended(job.request, how)
        if news is not None:
            self._tell(job, news)
        job.release()

    def _remove(self, job: Job) -> None:
        """End a job that was cancelled."""
        self._take_away(job)
        self._end_job(job, "cancelled")

    def _take_away(self, job: Job) -> None:
        """Free what a job has in the decoder, or its place among those that wait for another one."""
        for id in [id for id, each in self._jobs.items() if each is job]:
            self.decoder.cancel(id)  # the event of which finds no job
            del self._jobs[id]
        if job in self._held:
            self._held.remove(job)

    def _expire(self) -> None:
        """End jobs whose deadline has passed."""
        now = time.monotonic()
        for job in [*self._jobs.values(), *self._held]:
            if job.deadline is not None and job.deadline <= now:
                self._take_away(job)
                self._end_job(job, "failed", Timeout("the time limit passed before the answer had ended"))

    # ---- changes

    def _swap(self, lineup: Lineup, future: Future) -> None:
        assert lineup.adapters is not None
        try:
            self.decoder.swap(lineup.adapters)
        except ValueError as error:
            future.set_exception(error)
            return
        self.roster.lineup = lineup
        future.set_result(None)

    def _succeed_with(self, successor: _Successor) -> None:
        self._successor = successor

    def _hand_over(self) -> None:
        """Let the next decoder take over, with the jobs that waited for it."""
        successor, self._successor = self._successor, None
        assert successor is not None
        self.decoder, self.roster.lineup = successor.decoder, successor.lineup
        successor.future.set_result(None)
        held, self._held = self._held, deque()
        for job in held:
            self._admit(job)

    def _restart(self, error: Exception) -> None:
        """End all jobs of a decoder that failed, and make another."""
        jobs, self._jobs = self._jobs, {}
        self.restarts += 1
        for job in jobs.values():
            self._end_job(job, "failed", StepFailed(f"decoding failed ({type(error).__name__}); try again"))
        self.decoder = make_decoder(self.roster, self.roster.adapters, self.limits)

    def _refuse_rest(self) -> None:
        """End what is unfinished when the thread leaves."""
        error = Draining("the server shut down before the answer had ended")
        while not self._messages.empty():
            self._messages.get()()
        for job in [*self._jobs.values(), *self._held]:
            self._take_away(job)
            self._end_job(job, "failed", error)
        futures = [call.future for call in self._calls] + ([self._successor.future] if self._successor else [])
        for future in futures:
            if future.set_running_or_notify_cancel():
                future.set_exception(error)
        self._calls.clear()
        self._successor = None
