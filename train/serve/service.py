"""What every route needs: the engine, the server's settings, and how a request is read and turned into jobs."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Coroutine, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from starlette.requests import Request

from jaxsteer.inference import scheduling
from jaxsteer.inference.draws import Sampling
from jaxsteer.models.config import check_length
from train.serve.errors import ApiError, bad_request, invalid
from train.serve.metrics import Metrics
from train.serve.observe import LOG, facts_of
from train.serve.protocol import Generate
from train.serving.engine import Busy, Draining, Engine, EngineError, NonFinite, Timeout
from train.serving.models import Served, UnknownModel
from train.serving.prompts import Prompt

T = TypeVar("T")
Kind = TypeVar("Kind", bound=BaseModel)

DRAINING_RETRY_SECONDS = 5
"""After which another server may have taken the place of one that is being stopped."""
SMALLEST_TOP_P = 1e-6
"""In place of 0, which means the most likely token alone."""


@dataclass(frozen=True)
class ServeSettings:
    """How requests are answered.

    timeout        seconds after which a request ends with an error, waiting or not
    max_body       bytes of a request's body at most
    api_key        that requests must have; None for none
    strength       of the steering, for requests without one
    loading        whether adapters may be loaded and unloaded
    log_requests   whether prompts and answers are logged
    allowed_hosts  names in the header Host that are accepted; () for any
    send_timeout   seconds that a client of a stream may take to read what it is sent
    """

    timeout: float = 300.0
    max_body: int = 1 << 20
    api_key: str | None = field(default=None, repr=False)
    strength: float = 1.0
    loading: bool = False
    log_requests: bool = False
    allowed_hosts: tuple[str, ...] = ()
    send_timeout: float = 60.0


@dataclass(frozen=True)
class Service:
    """The engine behind the routes.

    engine    answers
    settings  of the server
    metrics   of what was answered
    version   of jaxsteer
    """

    engine: Engine
    settings: ServeSettings
    metrics: Metrics
    version: str

    def served(self, request: Request, name: str) -> Served:
        """The model that a request names, which is then also in its metrics and in the log.

        Raises:
            ApiError: 404, there is none.
        """
        try:
            served = self.engine.roster.get(name)
        except UnknownModel as error:
            raise unknown_model(error) from None
        facts_of(request).model = name
        return served

    def strength(self, served: Served, given: float | Mapping[str, float] | None) -> dict[str, float]:
        """The strength of a model's slots for a job: as asked for, else as the server is set.

        Raises:
            ApiError: 400, an unknown slot, or the model is the base model.
        """
        if given is None and served.adapter is not None and self.settings.strength != 1:
            given = self.settings.strength
        try:
            return served.strength(given)
        except ValueError as error:
            raise bad_request(str(error), "steering_strength", "invalid_value") from None

    def job(self, served: Served, body: Generate, prompt: Prompt, new_tokens: int, top: int) -> scheduling.Request:
        """What the engine is asked for; the seed is given later.

        Args:
            served: the model that answers.
            body: the request.
            prompt: one of its prompts.
            new_tokens: number of tokens to generate at most.
            top: number of most likely tokens to report at each step.

        Raises:
            ApiError: 400, see `strength`.
        """
        return scheduling.Request(
            prompt.tokens,
            new_tokens,
            prompt.stop,
            sampling_of(body),
            strength=self.strength(served, body.steering_strength),
            adapter=served.adapter,
            top=top,
        )

    def check_choices(self, count: int) -> None:
        """Refuse a request for more answers than the engine could ever take at once.

        Raises:
            ApiError: 400.
        """
        most = self.engine.limits.rows + self.engine.settings.queue
        if count > most:
            message = f"'n' times the number of prompts must be at most {most} (--rows and --queue), got {count}"
            raise bad_request(message, "n", "invalid_value")

    def check_prompt(self, prompt: Prompt, param: str) -> None:
        """Refuse a prompt that is too long.

        Raises:
            ApiError: 400.
        """
        tokens, source, most = len(prompt.tokens.ids), prompt.tokens.source, self.engine.limits.max_prompt
        message = f"{source}: {tokens:,} tokens, but this server reads up to {most:,} (--max-prompt)"
        try:
            check_length(self.engine.roster.loaded.config, tokens, source)
        except ValueError as error:
            message, most = str(error), 0
        if tokens > most:
            raise bad_request(message, param, "context_length_exceeded")

    def new_tokens(self, asked: int | None, prompt: Prompt, param: str) -> int:
        """Number of tokens to generate: as asked for, else what is left of the model's context, up to the limit.

        Raises:
            ApiError: 400, more than the server's limit.
        """
        limit = self.engine.limits.max_new_tokens
        if asked is None:
            left = self.engine.roster.loaded.config.max_length - len(prompt.tokens.ids)
            return min(limit, left) if left > 0 else limit
        if asked > limit:
            message = f"'{param}' must be at most {limit:,} (the server's --max-new-tokens), got {asked:,}"
            raise bad_request(message, param, "invalid_value")
        return asked

    def note_prompts(self, request: Request, prompts: Sequence[Prompt]) -> int:
        """The number of tokens of a request's prompts, which is noted, and what they say if that is wanted."""
        facts = facts_of(request)
        facts.prompt_tokens = sum(len(prompt.tokens.ids) for prompt in prompts)
        for prompt in prompts if self.settings.log_requests else ():
            LOG.info("#%d prompt: %r", facts.number, prompt.text)
        return facts.prompt_tokens

    async def computed(self, work: Future[T]) -> T:
        """The result of what the engine computes for a request; not computed if the client leaves before its turn.

        Raises:
            ApiError: 504, it was not there in time; or the engine's error.
        """
        try:
            return await asyncio.wait_for(asyncio.wrap_future(work), self.settings.timeout)
        except TimeoutError:
            raise of_engine(Timeout(f"no result within {self.settings.timeout:g} seconds")) from None
        except EngineError as error:
            raise of_engine(error) from None


def service_of(request: Request) -> Service:
    """The service of the app that got a request."""
    return request.app.state.service


async def read(request: Request, kind: type[Kind]) -> Kind:
    """The body of a request.

    Raises:
        ApiError: 400, 408, 413 or 415: it is not of this kind, too slow, too large, or not said to be JSON.
    """
    given = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if given != "application/json":
        # A page of another site can send other types without asking the browser first whether this server lets it.
        raise ApiError(415, f"The header Content-Type must be application/json, got {given!r:.80}", code="not_json")
    try:
        return kind.model_validate_json(await request.body())
    except ValidationError as error:
        raise invalid(kind, error) from None


def sampling_of(body: Generate) -> Sampling:
    """How tokens are chosen: by default from the model's own distribution, as OpenAI does."""
    return Sampling(
        1.0 if body.temperature is None else body.temperature,
        max(body.top_k or 0, 0),
        1.0 if body.top_p is None else max(body.top_p, SMALLEST_TOP_P),
    )


def seeds_of(body: Generate) -> list[int]:
    """A seed for each answer to a prompt: those after the given one, or random ones."""
    first = secrets.randbits(63) if body.seed is None else body.seed
    return [(first + number) % (1 << 64) for number in range(body.choices)]


def unknown_model(error: UnknownModel) -> ApiError:
    """The response to a name that no model has."""
    return ApiError(404, str(error), param="model", code="model_not_found")


def of_engine(error: EngineError) -> ApiError:
    """The response to an error of the engine."""
    match error:
        case Busy():
            headers = {"Retry-After": str(error.retry_after)}
            return ApiError(429, str(error), code="queue_full", headers=headers)
        case Draining():
            return ApiError(503, str(error), code="draining", headers={"Retry-After": str(DRAINING_RETRY_SECONDS)})
        case Timeout():
            return ApiError(504, str(error), code="timeout")
        case NonFinite():
            return bad_request(str(error), code="non_finite_logits")
    return ApiError(500, str(error), code="engine_failed")


class ClientLeft(Exception):
    """The client closed the connection before its answer was complete."""


async def while_connected(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """Do some work for a request whose body has been read; stop it if the client leaves.

    Raises:
        ClientLeft: the client did.
    """

    async def left() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    working, leaving = asyncio.ensure_future(work), asyncio.ensure_future(left())
    try:
        await asyncio.wait((working, leaving), return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientLeft
        return working.result()
    finally:
        working.cancel()
        leaving.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)
