"""Prompts of requests as tokens, exactly as training has them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jaxsteer.batches import Tokens
from jaxsteer.io import LoadedModel
from train.serving.models import Served


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
    raise NotImplementedError


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
    raise NotImplementedError
