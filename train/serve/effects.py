"""POST /v1/effects: how far steering moves each token, and what it makes likely in its place."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Literal

import numpy as np
from anyio import to_thread
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from typing_extensions import TypedDict

from train.serve.chats import conversation
from train.serve.errors import bad_request
from train.serve.protocol import EffectsRequest
from train.serve.service import Service, of_engine, read, service_of, unknown_model, while_connected
from train.serving.effects import Effects, Part, Passage, TokenEffect, effects
from train.serving.engine import EngineError
from train.serving.models import Served, UnknownModel
from train.serving.prompts import Prompt, plain_prompt
from train.serving.text import Alternative


class LikelyText(TypedDict):
    """A token that is likely in place of another."""

    text: str
    log_probability: float


class TokenEntry(TypedDict):
    """What steering does to a token, null where nothing predicts it.

    Its shift is the mean over layers of ‖h' − h‖ / ‖h‖ in the residual stream.
    """

    id: int
    text: str
    part: Part
    shift: float
    log_probability: float | None
    log_probability_base: float | None
    top: list[LikelyText]
    top_base: list[LikelyText]


class EffectsReply(TypedDict):
    """The response: tokens, and the shift of each after each layer, [layers][tokens]."""

    object: Literal["steering.effects"]
    model: str
    layers: int
    tokens: list[TokenEntry]
    shift: list[list[float]]


async def token_effects(request: Request) -> Response:
    """Compare a steered model with its base on every token of a prompt and an answer."""
    service, body = service_of(request), await read(request, EffectsRequest)
    served = service.served(request, body.model)
    return await while_connected(request, _respond(request, service, served, body))


async def _respond(request: Request, service: Service, served: Served, body: EffectsRequest) -> Response:
    prompt, answer = await to_thread.run_sync(_passage, service, served, body)
    service.note_prompts(request, [prompt])
    passage = Passage(served, prompt.tokens, answer, service.strength(served, body.steering_strength), body.top_tokens)
    decode = service.engine.roster.loaded.require_tokenizer().decode
    try:
        work = service.engine.run(partial(effects, passage=passage, decode=decode))
        found = await service.computed(work)
    except EngineError as error:
        raise of_engine(error) from None
    except UnknownModel as error:
        raise unknown_model(error) from None
    except (ValueError, FloatingPointError) as error:
        raise bad_request(str(error)) from None
    return JSONResponse(await to_thread.run_sync(_reply, body.model, found))


def _passage(service: Service, served: Served, body: EffectsRequest) -> tuple[Prompt, np.ndarray]:
    """Prompt and answer as tokens.

    Raises:
        ApiError: 400, they cannot be read by the model, or are too long for the server.
    """
    loaded = service.engine.roster.loaded
    if body.messages is not None:
        prompt = conversation(service, served, body.messages)
    else:
        assert body.prompt is not None
        prompt = _plain(service, body.prompt)
    tokenizer = loaded.require_tokenizer()
    answer = np.array(tokenizer(body.answer, add_special_tokens=False)["input_ids"], np.int32)
    most = service.engine.limits.max_new_tokens
    if len(answer) > most:
        message = f"'answer' has {len(answer):,} tokens, more than this server generates ({most:,}, --max-new-tokens)"
        raise bad_request(message, "answer", "invalid_value")
    return prompt, answer


def _plain(service: Service, given: str | list[int]) -> Prompt:
    try:
        prompt = plain_prompt(service.engine.roster.loaded, given, "prompt")
    except ValueError as error:
        raise bad_request(str(error), "prompt", "invalid_value") from None
    service.check_prompt(prompt, "prompt")
    return prompt


def _reply(model: str, found: Effects) -> EffectsReply:
    return {
        "object": "steering.effects",
        "model": model,
        "layers": len(found.shift),
        "tokens": list(map(_entry, found.tokens)),
        "shift": found.shift.tolist(),
    }


def _entry(token: TokenEffect) -> TokenEntry:
    return {
        "id": token.id,
        "text": token.text,
        "part": token.part,
        "shift": float(token.shift.mean()),
        "log_probability": token.log_probability,
        "log_probability_base": token.log_probability_base,
        "top": _likely(token.top),
        "top_base": _likely(token.top_base),
    }


def _likely(alternatives: Sequence[Alternative]) -> list[LikelyText]:
    return [{"text": each.text, "log_probability": each.log_probability} for each in alternatives]
