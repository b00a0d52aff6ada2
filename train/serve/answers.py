"""The answers that one request asks for, as they come."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial

from starlette.requests import Request

from jaxsteer.inference import scheduling
from jaxsteer.inference.events import Event
from train.serve.errors import bad_request
from train.serve.metrics import Timer
from train.serve.observe import LOG, facts_of
from train.serve.service import Service, of_engine, unknown_model
from train.serving.engine import EngineError, Job, Listener, Timeout
from train.serving.models import UnknownModel
from train.serving.text import Delta, End, TextOfAnswer, Token


@dataclass(frozen=True)
class Ask:
    """An answer that is wanted.

    job     for the engine
    stop    texts that end it
    tokens  whether its tokens are wanted one by one
    """

    job: scheduling.Request
    stop: tuple[str, ...] = ()
    tokens: bool = False


class Answers:
    """The answers to a request, all submitted at once. `close` them, read or not: it frees their rows.

    What the engine tells waits in a queue, so that a client that reads slowly holds up nobody; an answer's maximum
    number of tokens bounds it.

    Args:
        service: with the engine.
        request: that is answered; what is known of it is noted there.
        asks: what is wanted.

    Raises:
        ApiError: 400, 404, 429 or 503: something that the engine refuses. Then nothing is answered.
    """

    def __init__(self, service: Service, request: Request, asks: Sequence[Ask]) -> None:
        self._facts, self._logged = facts_of(request), service.settings.log_requests
        decode = partial(service.engine.roster.loaded.require_tokenizer().decode, skip_special_tokens=True)
        self._texts = [TextOfAnswer(decode, ask.stop, tokens=ask.tokens) for ask in asks]
        self._timers = [Timer(service.metrics, self._facts.model) for _ in asks]
        self._left = set(range(len(asks)))
        self._news: asyncio.Queue[tuple[int, Event | EngineError]] = asyncio.Queue()
        self._jobs: list[Job] = []
        # The engine keeps to the deadline too, but only between its steps.
        expire = partial(self._news.put_nowait, (-1, Timeout(f"no answer within {service.settings.timeout:g} seconds")))
        self._expiry = asyncio.get_running_loop().call_later(service.settings.timeout, expire)
        deadline = time.monotonic() + service.settings.timeout
        try:
            for index, ask in enumerate(asks):
                self._jobs.append(service.engine.submit(ask.job, self._listener(index), deadline=deadline))
        except EngineError as error:
            self.close()
            raise of_engine(error) from None
        except ValueError as error:
            self.close()
            raise (unknown_model(error) if isinstance(error, UnknownModel) else bad_request(str(error))) from None

    def _listener(self, index: int) -> Listener:
        loop = asyncio.get_running_loop()

        def tell(news: Event | EngineError) -> None:
            with suppress(RuntimeError):  # the loop is closed: the server has ended
                loop.call_soon_threadsafe(self._news.put_nowait, (index, news))

        return tell

    @property
    def count(self) -> int:
        """Number of answers."""
        return len(self._texts)

    @property
    def generated(self) -> int:
        """Number of tokens generated so far."""
        return sum(text.generated for text in self._texts)

    async def deltas(self) -> AsyncIterator[tuple[int, Delta]]:
        """(index of the answer, what is new), until all have ended.

        Raises:
            ApiError: an answer ended with an error.
        """
        while self._left:
            index, news = await self._news.get()
            if isinstance(news, EngineError):
                raise of_engine(news)
            if index in self._left:  # otherwise it came before the job was cancelled
                yield index, self._push(index, news)

    def _push(self, index: int, event: Event) -> Delta:
        text, timer, now = self._texts[index], self._timers[index], time.perf_counter()
        delta = text.push(event)
        timer.got(text.generated, now)
        self._facts.answer_tokens = self.generated
        if delta.finished is not None:
            self._left.discard(index)
            self._jobs[index].cancel()  # a stop string ends the answer before the model does
            timer.ended(text.generated, now)
            if self._logged:
                LOG.info("#%d answer %d: %r", self._facts.number, index, text.text)
        return delta

    async def whole(self) -> list[Delta]:
        """Each answer from its beginning to its end.

        Raises:
            ApiError: an answer ended with an error.
        """
        tokens = [list[Token]() for _ in self._texts]
        ends: dict[int, End | None] = {}
        try:
            async for index, delta in self.deltas():
                tokens[index] += delta.tokens
                ends[index] = delta.finished
        finally:
            self.close()
        return [Delta(text.text, tuple(tokens[index]), ends[index]) for index, text in enumerate(self._texts)]

    def close(self) -> None:
        """Cancel what has not ended."""
        self._left.clear()
        self._expiry.cancel()
        for job in self._jobs:
            job.cancel()
