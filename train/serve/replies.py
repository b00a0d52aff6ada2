"""What clients get: OpenAI's objects, whole and as the chunks of a stream."""

from __future__ import annotations

import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from typing_extensions import TypedDict  # pydantic reads this one's fields before Python 3.12

from train.serving.text import Alternative, End, Token


class Usage(TypedDict):
    """Numbers of tokens: each prompt counts once, and its answers as far as they were generated."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class CompletionLogprobs(TypedDict):
    """Tokens with their log-probabilities; null where nothing predicts the token.

    A token that is the first part of a character has no text. Offsets are in the text of the choice.
    """

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None] | None
    text_offset: list[int]


class CompletionChoice(TypedDict):
    """An answer to a prompt, or a piece of one."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: End | None


class Completion(TypedDict):
    """The response to POST /v1/completions, or a chunk of one."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[CompletionChoice]
    usage: Usage | None


class LikelyToken(TypedDict):
    """A token, its log-probability, and its text in UTF-8."""

    token: str
    logprob: float
    bytes: list[int]


class ChatToken(LikelyToken):
    """A token of an answer with the most likely ones in its place."""

    top_logprobs: list[LikelyToken]


class ChatLogprobs(TypedDict):
    """The tokens of an answer."""

    content: list[ChatToken]
    refusal: None


class ChatMessage(TypedDict):
    """An answer."""

    role: Literal["assistant"]
    content: str
    refusal: None


class ChatChoice(TypedDict):
    """An answer and why it ended."""

    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | None
    finish_reason: End


class ChatCompletion(TypedDict):
    """The response to POST /v1/chat/completions."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChatChoice]
    usage: Usage


@dataclass(frozen=True)
class Heading:
    """What all chunks of a response begin with.

    model    name of the model as the request gives it
    kind     OpenAI's name of the object
    prefix   of the id
    version  of the server
    id       of the response
    created  Unix time in seconds
    """

    model: str
    kind: str
    prefix: str
    version: str
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    created: int = field(default_factory=lambda: int(time.time()))

    def around(self, choices: Sequence[Mapping[str, Any]], **more: Any) -> dict[str, Any]:
        """A response or a chunk with these choices."""
        return {
            "id": f"{self.prefix}-{self.id}",
            "object": self.kind,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": f"jaxsteer-{self.version}",
            "choices": list(choices),
            **more,
        }


def usage(prompt_tokens: int, completion_tokens: int) -> Usage:
    """Numbers of tokens."""
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    }


@dataclass(frozen=True)
class Scored:
    """A token of a prompt or an answer, ready to be shown.

    text             what it adds to the text
    log_probability  natural logarithm; None where nothing predicts it
    top              the most likely tokens in its place
    """

    text: str
    log_probability: float | None
    top: Sequence[Alternative]

    @classmethod
    def of(cls, token: Token) -> Scored:
        """A token of an answer."""
        return cls(token.text, token.log_probability, token.top)


def completion_logprobs(tokens: Sequence[Scored], start: int, *, top: bool) -> CompletionLogprobs:
    """The tokens of (a piece of) a completion.

    Args:
        tokens: of the piece.
        start: characters of the choice's text before it; below 0 if tokens before the text have one of their own, such
            as the token that begins every text.
        top: whether the most likely tokens are wanted; the token itself is then among them.
    """
    offsets = [start]
    for token in tokens:
        offsets.append(offsets[-1] + len(token.text))
    return {
        "tokens": [token.text for token in tokens],
        "token_logprobs": [token.log_probability for token in tokens],
        "top_logprobs": [_by_text(token) for token in tokens] if top else None,
        "text_offset": [max(0, offset) for offset in offsets[:-1]],
    }


def _by_text(token: Scored) -> dict[str, float] | None:
    """Log-probabilities by the tokens' texts: of two with one text the likelier, but the token itself in any case."""
    if token.log_probability is None:
        return None
    found: dict[str, float] = {}
    for each in token.top:
        found.setdefault(each.text, each.log_probability)
    return found | {token.text: token.log_probability}


def chat_logprobs(tokens: Sequence[Token]) -> ChatLogprobs:
    """The tokens of (a piece of) an answer."""
    content: list[ChatToken] = [
        {
            **_likely(token.text, token.log_probability),
            "top_logprobs": [_likely(each.text, each.log_probability) for each in token.top],
        }
        for token in tokens
    ]
    return {"content": content, "refusal": None}


def _likely(text: str, log_probability: float) -> LikelyToken:
    return {"token": text, "logprob": log_probability, "bytes": list(text.encode())}
