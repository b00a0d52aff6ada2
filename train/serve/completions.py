"""POST /v1/completions: prompts continued as they are, with the log-probabilities of their own tokens if wanted."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from anyio import to_thread
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from train.serve.answers import Answers, Ask
from train.serve.errors import bad_request
from train.serve.protocol import CompletionRequest
from train.serve.replies import CompletionChoice, Heading, Scored, completion_logprobs, usage
from train.serve.scoring import score_prompts
from train.serve.service import Service, read, seeds_of, service_of, while_connected
from train.serve.streaming import ChunkStream
from train.serving.models import Served
from train.serving.prompts import Prompt, plain_prompt
from train.serving.text import End


async def completions(request: Request) -> Response:
    """Continue one prompt or several."""
    service, body = service_of(request), await read(request, CompletionRequest)
    served = service.served(request, body.model)
    return await while_connected(request, _respond(request, service, served, body))


async def _respond(request: Request, service: Service, served: Served, body: CompletionRequest) -> Response:
    prompts = await to_thread.run_sync(_prompts, service, body)
    asks = _asks(service, served, body, prompts)
    echoes = await _echoes(service, served, body, prompts) if body.echo else None
    prompt_tokens = service.note_prompts(request, prompts)
    writer = _Writer(body, echoes, len(prompts) * body.choices)
    heading = Heading(body.model, "text_completion", "cmpl", service.version)
    answers = Answers(service, request, asks)
    if body.stream:
        chunks = _chunks(writer, heading, answers, prompt_tokens)
        return ChunkStream(request, answers, chunks, service.settings.send_timeout)
    choices = await _choices(writer, answers)
    return JSONResponse(heading.around(choices, usage=usage(prompt_tokens, answers.generated)))


def _prompts(service: Service, body: CompletionRequest) -> list[Prompt]:
    """The prompts as tokens.

    Raises:
        ApiError: 400, not a text or ids that the model can continue, or too many or too long for the server.
    """
    given, loaded = body.prompts, service.engine.roster.loaded
    service.check_choices(len(given) * body.choices)
    names = ["prompt"] if len(given) == 1 else [f"prompt[{index}]" for index in range(len(given))]
    prompts = []
    for each, name in zip(given, names, strict=True):
        try:
            prompts.append(plain_prompt(loaded, each, name))
        except ValueError as error:
            raise bad_request(str(error), "prompt", "invalid_value") from None
        service.check_prompt(prompts[-1], "prompt")
    return prompts


def _asks(service: Service, served: Served, body: CompletionRequest, prompts: Sequence[Prompt]) -> list[Ask]:
    """What the engine is asked for: n answers to each prompt, one prompt after the other."""
    asks = []
    for prompt in prompts:
        count = service.new_tokens(body.new_tokens, prompt, "max_tokens")
        if not count:
            continue
        job = service.job(served, body, prompt, count, body.logprobs or 0)
        if count == 1 and body.echo and body.logprobs is not None:
            # Programs that score texts ask so, and leave out the last token, which must then be there.
            job = replace(job, stop_tokens=())
        asks += [Ask(replace(job, seed=seed), body.stops, body.logprobs is not None) for seed in seeds_of(body)]
    return asks


@dataclass(frozen=True)
class _Echo:
    """A prompt that is part of the answer's text.

    text    as it was given
    tokens  with their log-probabilities; () unless they are wanted
    """

    text: str
    tokens: Sequence[Scored] = ()


async def _echoes(service: Service, served: Served, body: CompletionRequest, prompts: Sequence[Prompt]) -> list[_Echo]:
    texts = [given if isinstance(given, str) else p.text for given, p in zip(body.prompts, prompts, strict=True)]
    if body.logprobs is None:
        return [_Echo(text) for text in texts]
    strength = service.strength(served, body.steering_strength)
    scored = await score_prompts(service, served, [prompt.tokens for prompt in prompts], strength, body.logprobs)
    return [_Echo(text, tokens) for text, tokens in zip(texts, scored, strict=True)]


class _Writer:
    """Writes choices, whole or piece by piece.

    Args:
        body: the request.
        echoes: the prompts, if they are part of the text.
        count: number of choices.
    """

    def __init__(self, body: CompletionRequest, echoes: Sequence[_Echo] | None, count: int) -> None:
        self._body, self._echoes, self.count = body, echoes, count
        self._offsets = [0] * count  # characters of each choice's tokens so far

    @property
    def echoes(self) -> bool:
        """Whether texts begin with the prompt."""
        return self._echoes is not None

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with the numbers of tokens."""
        return self._body.include_usage

    def first(self, index: int) -> tuple[str, list[Scored]]:
        """What a choice begins with before anything is generated."""
        if self._echoes is None:
            return "", []
        echo = self._echoes[index // self._body.choices]
        if echo.tokens:  # the token that begins every text is not part of the prompt as given
            self._offsets[index] = len(echo.text) - sum(len(token.text) for token in echo.tokens)
        return echo.text, list(echo.tokens)

    def choice(self, index: int, text: str, tokens: Sequence[Scored], finished: End | None) -> CompletionChoice:
        """A choice, or its next piece."""
        logprobs = None
        if self._body.logprobs is not None:
            logprobs = completion_logprobs(tokens, self._offsets[index], top=self._body.logprobs > 0)
            self._offsets[index] += sum(len(token.text) for token in tokens)
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": finished}


async def _choices(writer: _Writer, answers: Answers) -> list[CompletionChoice]:
    """All choices; where nothing is generated, they are the prompts."""
    choices = []
    deltas = await answers.whole()
    for index in range(writer.count):
        text, tokens = writer.first(index)
        finished: End | None = "length"
        if deltas:
            text, finished = text + deltas[index].text, deltas[index].finished
            tokens += map(Scored.of, deltas[index].tokens)
        choices.append(writer.choice(index, text, tokens, finished))
    return choices


async def _chunks(
    writer: _Writer, heading: Heading, answers: Answers, prompt_tokens: int
) -> AsyncIterator[dict[str, Any]]:
    """The chunks of a stream."""
    more = {"usage": None} if writer.include_usage else {}
    if writer.echoes:
        for index in range(writer.count):
            finished: End | None = None if answers.count else "length"
            yield heading.around([writer.choice(index, *writer.first(index), finished)], **more)
    async for index, delta in answers.deltas():
        if delta.text or delta.tokens or delta.finished:
            tokens = list(map(Scored.of, delta.tokens))
            yield heading.around([writer.choice(index, delta.text, tokens, delta.finished)], **more)
    if writer.include_usage:
        yield heading.around([], usage=usage(prompt_tokens, answers.generated))
