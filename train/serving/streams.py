"""The events of a job in asyncio."""

from __future__ import annotations

from collections.abc import AsyncIterator

from jaxsteer.inference.events import Event
from jaxsteer.inference.scheduling import Request
from train.serving.engine import Engine, Job


class EventStream(AsyncIterator[Event]):
    """A job's events, for one reader: `async for event in stream`.

    The job is cancelled when its reader leaves: by `aclose`, at the end of an `async with` block, when the task that
    waits for an event is cancelled, or when the stream is no longer referenced.

    Attributes:
        job: the accepted request.
    """

    job: Job

    async def __anext__(self) -> Event:
        """The next event.

        Raises:
            EngineError: the job ended without an answer.
        """
        raise NotImplementedError

    async def aclose(self) -> None:
        """Leave: cancel the job if it has not ended."""
        raise NotImplementedError

    async def __aenter__(self) -> EventStream:
        """The stream itself."""
        raise NotImplementedError

    async def __aexit__(self, *details: object) -> None:
        """Leave."""
        raise NotImplementedError


def events(engine: Engine, request: Request, *, deadline: float | None = None) -> EventStream:
    """Submit a request at once, and read its events in the running event loop.

    Args:
        engine, request, deadline: see `Engine.submit`.

    Raises:
        EngineError, ValueError: as `Engine.submit`, before anything is read.
    """
    raise NotImplementedError
