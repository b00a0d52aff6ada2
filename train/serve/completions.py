"""POST /v1/completions: prompts continued as they are, with the log-probabilities of their own tokens if wanted."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from anyio import to_thread
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from train.serve.answers import Answers, Ask
from train.serve.errors import bad_request
from train.serve.protocol import CompletionRequest
from train.serve.replies import Heading, Scored, completion_logprobs, usage
from train.serve.scoring import score_prompts
from train.serve.service import Jobs, Service, read, service_of, while_connected
from train.serve.streaming import ChunkStream
from train.serving.models import Served
from train.serving.prompts import Prompt, plain_prompt
from train.serving.text import Delta


async def completions(request: Request) -> Response:
    """Answer a request for completions."""
    service, body = service_of(request), await read(request, CompletionRequest)
    served = service.served(request, body.model)
    return await while_connected(request, _respond(request, service, served, body))


async def _respond(request: Request, service: Service, served: Served, body: CompletionRequest) -> Response:
    wanted = await _prepare(service, served, body)
    heading = Heading(body.model, "text_completion", "cmpl", service.version)
    answers = Answers(service, body.model, wanted.asks)
    if body.stream:
        chunks = _chunks(body, wanted, heading, answers)
        return ChunkStream(request, answers, chunks, service.settings.send_timeout)
    try:
        deltas = await answers.whole()
    finally:
        answers.close()
    choices = [wanted.choice(index, delta) for index, delta in enumerate(deltas or wanted.nothing())]
    return JSONResponse(heading.around(choices, usage=usage(wanted.prompt_tokens, answers.generated)))
