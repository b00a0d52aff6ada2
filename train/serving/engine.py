"""The engine: one thread that owns the decoder, and through which many clients share it."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

from jaxsteer.adapters import Adapters
from jaxsteer.inference.events import Event
from jaxsteer.inference.scheduling import Limits, Request
from jaxsteer.models.transformer import Network
from train.serving.models import Roster, Served

T = TypeVar("T")


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


@dataclass(frozen=True)
class EngineSettings:
    """Sizes of an engine.

    rows            jobs decoded at a time
    max_prompt      maximum number of tokens in a prompt
    max_new_tokens  maximum number of tokens in an answer; at most the model's context
    chunk           maximum number of tokens of a job between two events, after which a cancelled one has left its row
    queue           jobs that may wait for a row, and calls of `Engine.run` that may wait
    prefill_chunk   prompts with more tokens are read that many at a time, so that other jobs go on
    prefix_tokens   keys and values of up to so many prompt tokens are kept for prompts that begin alike; 0 for none
    """

    rows: int = 32
    max_prompt: int = 1024
    max_new_tokens: int = 512
    chunk: int = 8
    queue: int = 256
    prefill_chunk: int = 256
    prefix_tokens: int = 0


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
    prefix_hits, prefix_tokens_reused  prompts that began like an earlier one, and their tokens that were not read again
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


Listener = Callable[[Event | EngineError], None]
"""Gets a job's events, the last of which has `finished`, or an error, which is the last. It is called on the engine's
thread, must not block, and must not raise."""


class Job:
    """A request that was accepted.

    Attributes:
        id: 0, 1, 2, ...; also that of its events.
    """

    id: int

    def cancel(self) -> None:
        """End the job from any thread; its row is free after the current chunk. Does nothing once it has ended.

        No event is delivered after the call, except for one that is being delivered meanwhile.
        """
        raise NotImplementedError


class Engine:
    """Answers the requests of many clients with one decoder, on a thread of its own.

    Args:
        roster: the base model and its adapters.
        settings: sizes.

    Raises:
        ValueError: sizes that the model does not allow.
    """

    roster: Roster
    settings: EngineSettings

    def __init__(self, roster: Roster, settings: EngineSettings | None = None) -> None:
        raise NotImplementedError

    @property
    def limits(self) -> Limits:
        """Sizes of the decoder, such as the maximum number of tokens in an answer."""
        raise NotImplementedError

    @property
    def draining(self) -> bool:
        """Whether `close` was called."""
        raise NotImplementedError

    def start(self, progress: Callable[[int, int], None] | None = None) -> None:
        """Compile all programs, so that no client waits for that, and start the thread.

        Args:
            progress: called as progress(done, total) with numbers of programs.
        """
        raise NotImplementedError

    def close(self, grace: float = 0.0) -> None:
        """Take no more jobs, let the accepted ones go on for up to `grace` seconds, end the rest with `Draining`, and
        end the thread. Not to be called on the engine's thread; further calls wait for the first."""
        raise NotImplementedError

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
        raise NotImplementedError

    def run(self, work: Callable[[Network, Adapters | None], T]) -> Future[T]:
        """Call `work(network, adapters)` on the engine's thread between two steps, during which nothing is decoded.

        Args:
            work: gets the model with all its weights, and the adapters stacked in them (None before there are any).

        Returns:
            Its result or exception; a future that is cancelled before its turn is not called.

        Raises:
            Busy: too many calls wait.
            Draining: the engine is being closed.
        """
        raise NotImplementedError

    def load(self, name: str, path: str) -> Served:
        """Read a steering file and serve it under a name, while other jobs go on; blocks the calling thread only.

        Nothing is compiled again if its slots have a place in the common plan. Otherwise all adapters are stacked anew,
        with another decoder: its programs are compiled first, then new jobs wait until the running ones have ended.

        Raises:
            Refused: see `Roster.read`; or there is no place left.
            Draining: the engine is being closed.
        """
        raise NotImplementedError

    def unload(self, name: str) -> None:
        """Stop serving an adapter. Jobs that were accepted before finish with it; its place is free after the last.

        Raises:
            UnknownModel: there is no such adapter.
            Refused: it is the base model.
        """
        raise NotImplementedError

    def stats(self) -> EngineStats:
        """Figures of now, from any thread."""
        raise NotImplementedError
