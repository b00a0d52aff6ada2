"""What is known of a request when it has ended: a line in the log, and the metrics."""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Collection
from dataclasses import dataclass, field

from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from train.serve.metrics import Metrics

LOG = logging.getLogger("jaxsteer.serve")
CLIENT_LEFT = 499
"""Status of requests whose client left before the answer was complete, as nginx counts them."""

_numbers = itertools.count(1)


@dataclass
class Facts:
    """What the routes note of a request.

    model          that answers it; "" if there is none of that name
    prompt_tokens  of its prompts
    answer_tokens  generated for it
    status         if it is not that of the response, which had begun when an error came
    number         of the request, in the log
    """

    model: str = ""
    prompt_tokens: int = 0
    answer_tokens: int = 0
    status: int | None = None
    number: int = field(default_factory=lambda: next(_numbers))


def facts_of(request: Request) -> Facts:
    """The facts of a request, to be changed."""
    return request.scope["state"]["facts"]


class Observe:
    """Middleware: counts, times and logs requests; never what they say.

    Args:
        metrics: that are told.
        routes: paths that are counted by themselves.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics, routes: Collection[str]) -> None:
        self._app, self._metrics, self._routes = app, metrics, frozenset(routes)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        facts, began, status, complete = Facts(), time.perf_counter(), 500, False
        scope.setdefault("state", {})["facts"] = facts

        async def watched(message: Message) -> None:
            nonlocal status, complete
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)
            complete = message["type"] == "http.response.body" and not message.get("more_body", False)

        try:
            await self._app(scope, receive, watched)
        finally:
            status = facts.status or (status if complete or status >= 400 else CLIENT_LEFT)
            self._note(scope, facts, status, time.perf_counter() - began)

    def _note(self, scope: Scope, facts: Facts, status: int, seconds: float) -> None:
        path = scope["path"]
        route = path if path in self._routes else "other"
        self._metrics.requests.labels(route, facts.model, str(status)).inc()
        self._metrics.latency.labels(route).observe(seconds)
        if facts.prompt_tokens:
            self._metrics.prompt_tokens.labels(facts.model).inc(facts.prompt_tokens)
            self._metrics.answer_tokens.labels(facts.model).inc(facts.answer_tokens)
        if route.startswith("/v1/"):
            tokens = f", {facts.prompt_tokens} + {facts.answer_tokens} tokens" if facts.prompt_tokens else ""
            model = f" {facts.model}" if facts.model else ""
            LOG.info("#%d %s %s%s: %d, %.2f s%s", facts.number, scope["method"], route, model, status, seconds, tokens)
