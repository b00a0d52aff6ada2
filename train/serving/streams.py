"""The events of a job in asyncio."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import suppress

from jaxsteer.inference.events import Event
from jaxsteer.inference.scheduling import Request
from train.serving.engine import Engine, EngineError, Job


class EventStream(AsyncIterator[Event]):
    """A job's events, for one reader: `async for event in stream`. Made by `events`.

    The job is cancelled when its reader leaves: by `aclose`, at the end of an `async with` block, when the task that
    waits for an event is cancelled, or when the stream is no longer referenced.

    Attributes:
        job: the accepted request.
    """

    def __init__(self, job: Job, news: asyncio.Queue[Event | EngineError]) -> None:
        self.job, self._news, self._ended = job, news, False

    async def __anext__(self) -> Event:
        """The next event.

        Raises:
            EngineError: the job ended without an answer.
        """
        if self._ended:
            raise StopAsyncIteration
        try:
            news = await self._news.get()
        except BaseException:
            self._leave()
            raise
        if isinstance(news, EngineError):
            self._ended = True
            raise news
        self._ended = news.finished is not None
        return news

    async def aclose(self) -> None:
        """Leave: cancel the job if it has not ended."""
        self._leave()

    async def __aenter__(self) -> EventStream:
        """The stream itself."""
        return self

    async def __aexit__(self, *details: object) -> None:
        """Leave."""
        self._leave()

    def __del__(self) -> None:
        """Leave: nobody can read on."""
        self._leave()

    def _leave(self) -> None:
        self._ended = True
        self.job.cancel()


def events(engine: Engine, request: Request, *, deadline: float | None = None) -> EventStream:
    """Submit a request at once, and read its events in the running event loop.

    Args:
        engine, request, deadline: see `Engine.submit`.

    Raises:
        EngineError, ValueError: as `Engine.submit`, before anything is read.
    """
    loop = asyncio.get_running_loop()
    news: asyncio.Queue[Event | EngineError] = asyncio.Queue()

    def listen(each: Event | EngineError) -> None:
        with suppress(RuntimeError):  # the loop is closed: nobody reads
            loop.call_soon_threadsafe(news.put_nowait, each)

    return EventStream(engine.submit(request, listen, deadline=deadline), news)
