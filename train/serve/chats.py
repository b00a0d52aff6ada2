"""POST /v1/chat/completions: answers to conversations, in the model's chat template."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from dataclasses import replace
from typing import Any

from anyio import to_thread
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from train.serve.answers import Answers, Ask
from train.serve.errors import bad_request
from train.serve.protocol import ChatRequest, Message
from train.serve.replies import ChatChoice, Heading, chat_logprobs, usage
from train.serve.service import Service, read, seeds_of, service_of, while_connected
from train.serve.streaming import ChunkStream
from train.serving.models import Served
from train.serving.prompts import Prompt, chat_prompt
from train.serving.text import Delta


async def chat_completions(request: Request) -> Response:
    """Answer a conversation."""
    service, body = service_of(request), await read(request, ChatRequest)
    served = service.served(request, body.model)
    return await while_connected(request, _respond(request, service, served, body))


async def _respond(request: Request, service: Service, served: Served, body: ChatRequest) -> Response:
    service.check_choices(body.choices)
    prompt = await to_thread.run_sync(conversation, service, served, body.messages)
    count = service.new_tokens(body.new_tokens, prompt, "max_tokens")
    job = service.job(served, body, prompt, count, body.top)
    prompt_tokens = service.note_prompts(request, [prompt])
    asks = [Ask(replace(job, seed=seed), body.stops, bool(body.logprobs)) for seed in seeds_of(body)]
    answers = Answers(service, request, asks)
    if body.stream:
        heading = Heading(body.model, "chat.completion.chunk", "chatcmpl", service.version)
        chunks = _chunks(body, heading, answers, prompt_tokens)
        return ChunkStream(request, answers, chunks, service.settings.send_timeout)
    heading = Heading(body.model, "chat.completion", "chatcmpl", service.version)
    choices = [_choice(body, index, delta) for index, delta in enumerate(await answers.whole())]
    return JSONResponse(heading.around(choices, usage=usage(prompt_tokens, answers.generated)))


def conversation(service: Service, served: Served, messages: list[Message]) -> Prompt:
    """Messages as tokens.

    Raises:
        ApiError: 400, the model cannot answer them, or they are too long for the server.
    """
    try:
        prompt = chat_prompt(service.engine.roster.loaded, served, [each.plain() for each in messages], "messages")
    except ValueError as error:
        raise bad_request(str(error), "messages", "invalid_value") from None
    service.check_prompt(prompt, "messages")
    return prompt


def _choice(body: ChatRequest, index: int, delta: Delta) -> ChatChoice:
    assert delta.finished is not None
    return {
        "index": index,
        "message": {"role": "assistant", "content": delta.text, "refusal": None},
        "logprobs": chat_logprobs(delta.tokens) if body.logprobs else None,
        "finish_reason": delta.finished,
    }


async def _chunks(
    body: ChatRequest, heading: Heading, answers: Answers, prompt_tokens: int
) -> AsyncIterator[dict[str, Any]]:
    """The chunks of a stream: of each choice the role, pieces of the text, and why it ended."""
    more = {"usage": None} if body.include_usage else {}

    def chunk(index: int, delta: Mapping[str, Any], logprobs: Any = None, finished: str | None = None) -> Any:
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finished}
        return heading.around([choice], **more)

    for index in range(answers.count):
        yield chunk(index, {"role": "assistant", "content": "", "refusal": None})
    async for index, delta in answers.deltas():
        if delta.text or delta.tokens:
            yield chunk(index, {"content": delta.text}, chat_logprobs(delta.tokens) if body.logprobs else None)
        if delta.finished:
            yield chunk(index, {}, finished=delta.finished)
    if body.include_usage:
        yield heading.around([], usage=usage(prompt_tokens, answers.generated))
