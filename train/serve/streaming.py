"""Responses that come chunk by chunk, as server-sent events."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Mapping
from typing import Any

from sse_starlette import EventSourceResponse
from sse_starlette.sse import SendTimeoutError
from starlette.requests import Request
from starlette.types import Receive, Scope, Send

from train.serve.answers import Answers
from train.serve.errors import ApiError, internal_error
from train.serve.observe import LOG, facts_of


class ChunkStream(EventSourceResponse):
    """Sends chunks, then [DONE]; an error is the last chunk. Closes the answers however it ends.

    Args:
        request: that is answered.
        answers: that the chunks are made of.
        chunks: objects to send.
        send_timeout: seconds that the client may take to read what it is sent.
    """

    def __init__(
        self, request: Request, answers: Answers, chunks: AsyncIterator[Mapping[str, Any]], send_timeout: float
    ) -> None:
        self._answers, self._facts = answers, facts_of(request)
        super().__init__(_events(request, chunks), sep="\n", send_timeout=send_timeout)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send everything, or as much as the client wants."""
        try:
            await super().__call__(scope, receive, send)
        except SendTimeoutError:
            LOG.info("#%d the client does not read its answer", self._facts.number)
        finally:
            self._answers.close()


async def _events(request: Request, chunks: AsyncIterator[Mapping[str, Any]]) -> AsyncIterator[dict[str, str]]:
    try:
        async for chunk in chunks:
            yield {"data": _data(chunk)}
    except Exception as error:
        if not isinstance(error, ApiError):
            LOG.exception("while streaming")
            error = internal_error()
        facts_of(request).status = error.status
        yield {"data": _data(error.body())}
        return
    yield {"data": "[DONE]"}


def _data(value: Mapping[str, Any]) -> str:
    """JSON in ASCII: some clients take U+2028 and its like for the end of a line."""
    return json.dumps(value, separators=(",", ":"))
