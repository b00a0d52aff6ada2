"""Messages with their answers, and the files that keep them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from jaxsteer.io.files import read_json, replacing
from train.plain import from_plain, to_plain

Mode = Literal["chat", "completion"]
"""How a message is put to the model: with those before it in the model's chat template, or alone in a template."""


@dataclass(frozen=True)
class Voice:
    """Who answers.

    adapter   name of an adapter; None for the base model
    strength  factor of each of the adapter's own slots; slots not named have 1
    """

    adapter: str | None = None
    strength: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Exchange:
    """A message and its answer.

    message   as it was typed
    answer    its text
    tokens    its token ids, without the stop token
    voice     who answered
    mode      how it was asked
    system    the system message at that time
    template  the template around the message in completion mode
    finished  why the answer ended, see `jaxsteer.inference.events.Finished`
    """

    message: str
    answer: str
    tokens: tuple[int, ...]
    voice: Voice
    mode: Mode
    system: str | None
    template: str
    finished: str


def messages_of(exchanges: Sequence[Exchange], system: str | None, message: str) -> list[dict[str, str]]:
    """A message with the conversation before it, as chat templates take them; completions are no part of it."""
    messages = [] if system is None else [{"role": "system", "content": system}]
    for each in exchanges:
        if each.mode == "chat":
            messages += [{"role": "user", "content": each.message}, {"role": "assistant", "content": each.answer}]
    return [*messages, {"role": "user", "content": message}]


_FORMAT = "jaxsteer chat 1"


@dataclass(frozen=True)
class _Message:
    """One line of a saved conversation; all but role and content are of answers."""

    role: Literal["system", "user", "assistant"]
    content: str
    tokens: tuple[int, ...] | None = None
    adapter: str | None = None
    strength: Mapping[str, float] = field(default_factory=dict)
    mode: Mode = "chat"
    template: str = "{prompt}"
    finished: str = "stop"


@dataclass(frozen=True)
class _Saved:
    """The content of a file."""

    format: Literal["jaxsteer chat 1"]
    model: str
    messages: tuple[_Message, ...]


def save(path: Path, exchanges: Sequence[Exchange], model: str) -> None:
    """Write a conversation as JSON; a file that is no conversation is not replaced.

    Raises:
        ValueError: another name than *.json, no such folder, or a file that holds something else.
    """
    if path.suffix != ".json":
        raise ValueError(f"{path}: conversations are saved as JSON; give a name that ends in .json")
    if not path.resolve().parent.is_dir():
        raise ValueError(f"{path}: there is no folder {path.parent}")
    if path.exists() and (path.is_dir() or _format_of(path) != _FORMAT):
        raise ValueError(f"{path}: exists and holds no conversation; give another name")
    system, messages = None, list[_Message]()
    for each in exchanges:
        if each.system != system:
            system = each.system
            messages.append(_Message("system", system or ""))
        messages.append(_Message("user", each.message))
        voice = {"adapter": each.voice.adapter, "strength": each.voice.strength, "tokens": each.tokens}
        asked = {"mode": each.mode, "template": each.template, "finished": each.finished}
        messages.append(_Message("assistant", each.answer, **voice, **asked))
    saved = to_plain(_Saved(_FORMAT, model, tuple(messages)))
    for message in saved["messages"]:
        if message["role"] != "assistant":
            for name in set(message) - {"role", "content"}:
                del message[name]
    with replacing(path) as file:
        file.write(json.dumps(saved, indent=1, ensure_ascii=False).encode())


def _format_of(path: Path) -> Any:
    try:
        return read_json(path).get("format")
    except ValueError:
        return None


def load(path: Path) -> tuple[list[Exchange], str]:
    """Read a conversation.

    Returns:
        The exchanges, and the name of the base model. Answers that were saved without token ids have none.

    Raises:
        ValueError: no such file, or not a saved conversation; the message says where.
    """
    data = read_json(path)
    if data.get("format") != _FORMAT:
        raise ValueError(f"{path}: no conversation saved by /save (its format is not {_FORMAT!r})")
    saved = from_plain(_Saved, data, str(path))
    exchanges, system, asked = list[Exchange](), None, None
    for number, each in enumerate(saved.messages):
        if (each.role == "assistant") != (asked is not None):
            raise ValueError(f"{path}: messages[{number}]: a user's message and its answer must take turns")
        if each.role == "system":
            system = each.content or None
        elif each.role == "user":
            asked = each.content
        else:
            assert asked is not None
            exchanges.append(_exchange(asked, each, system))
            asked = None
    if asked is not None:
        raise ValueError(f"{path}: messages[{len(saved.messages) - 1}]: has no answer")
    return exchanges, saved.model


def _exchange(message: str, reply: _Message, system: str | None) -> Exchange:
    voice = Voice(reply.adapter, reply.strength)
    return Exchange(
        message, reply.content, reply.tokens or (), voice, reply.mode, system, reply.template, reply.finished
    )
