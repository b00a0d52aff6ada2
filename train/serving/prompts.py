"""Prompts of requests as tokens, exactly as training has them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from jaxsteer.batches import Tokens
from jaxsteer.io import LoadedModel
from train.data import Encoding, Example, TokenizedExample, Turn, encode_prompts, stop_tokens
from train.data.encoding import PLAIN
from train.data.prompts import check_unicode
from train.serving.models import Served

ROLES = ("system", "user", "assistant")
"""Roles of messages."""


@dataclass(frozen=True)
class Prompt:
    """What a model reads.

    tokens  for `Request.prompt`
    text    that they stand for, special tokens included
    stop    ids that end an answer to it, for `Request.stop_tokens`
    """

    tokens: Tokens
    text: str
    stop: tuple[int, ...]


def plain_prompt(loaded: LoadedModel, given: str | Sequence[int], source: str) -> Prompt:
    """A text to continue, after the ids with which the tokenizer begins a text; or token ids, taken as they are.

    Args:
        loaded: the base model.
        given: a text, or token ids.
        source: names the prompt in error messages.

    Raises:
        ValueError: nothing to continue, not Unicode, or an id that the model does not have.
    """
    if not isinstance(given, str):
        return _prompt(loaded, _from_ids(given, loaded.config.vocab_size, source), PLAIN)
    check_unicode(given, source)
    return _encoded(loaded, Example.of(given, None, source), PLAIN)


def chat_prompt(loaded: LoadedModel, served: Served, messages: Sequence[Mapping[str, Any]], source: str) -> Prompt:
    """A conversation to answer, in the model's chat template with the date of the adapter's training.

    Args:
        loaded: the base model.
        served: the model that answers.
        messages: each with a "role" (system, user or assistant) and a text as "content"; the last one is not the
            assistant's.
        source: names the conversation in error messages.

    Raises:
        ValueError: no messages, another role or content, the last message is the assistant's, the model has no chat
            template, or the template refuses the conversation or rewrites its earlier messages.
    """
    if not loaded.require_tokenizer().chat_template:
        raise ValueError(
            f"{source}: {loaded.name} has no chat template, so it cannot answer messages; ask it to complete a text"
        )
    turns = tuple(_turn(message, f"{source}, message {number}") for number, message in enumerate(messages))
    if not turns or turns[-1].supervised:
        last = "there are none" if not turns else "the last one is the assistant's"
        raise ValueError(f"{source}: messages must end with one to answer, but {last}")
    return _encoded(loaded, Example(turns, source), Encoding(chat=True, date=served.date))


def _turn(message: Mapping[str, Any], source: str) -> Turn:
    role, content = message.get("role"), message.get("content")
    if role not in ROLES:
        raise ValueError(f"{source}: the role is {role!r:.80}; allowed are {', '.join(ROLES)}")
    if not isinstance(content, str):
        raise ValueError(f"{source}: the content must be a text")
    check_unicode(content, source)
    return Turn(role, content)


def _from_ids(given: Sequence[int], vocab_size: int, source: str) -> TokenizedExample:
    """Token ids as a prompt, which has no completion."""
    if outside := [token for token in given if not 0 <= token < vocab_size]:
        raise ValueError(f"{source}: {outside[0]} is not a token id of this model, which are 0 to {vocab_size - 1}")
    if not given:
        raise ValueError(f"{source}: an empty prompt; there is nothing to continue")
    return TokenizedExample(np.array(given, np.int32), np.zeros(len(given), bool), len(given), source)


def _encoded(loaded: LoadedModel, example: Example, encoding: Encoding) -> Prompt:
    tokens, _ = encode_prompts([example], loaded.require_tokenizer(), encoding)
    return _prompt(loaded, tokens[0], encoding)


def _prompt(loaded: LoadedModel, tokens: TokenizedExample, encoding: Encoding) -> Prompt:
    tokenizer = loaded.require_tokenizer()
    stop = tuple(sorted({*loaded.stop_tokens, *stop_tokens(tokenizer, encoding)}))
    return Prompt(tokens, tokenizer.decode(tokens.ids), stop)
