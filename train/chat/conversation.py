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

    model     name of an adapter; None for the base model
    strength  factor of each of the adapter's own slots; slots not named have 1
    """

    model: str | None = None
    strength: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Form:
    """How a message is put to the model.

    mode      chat or completion
    system    the system message of a chat
    template  the text around a message to complete
    """

    mode: Mode
    system: str | None = None
    template: str = "{prompt}"


@dataclass(frozen=True)
class Exchange:
    """A message and its answer.

    message   as it was typed
    form      how it was put to the model
    voice     who answered
    answer    the text
    tokens    its token ids, without the stop token
    finished  why the answer ended, see `jaxsteer.inference.events.Finished`
    """

    message: str
    form: Form
    voice: Voice
    answer: str
    tokens: tuple[int, ...]
    finished: str


def messages_of(before: Sequence[Exchange], system: str | None, message: str) -> list[dict[str, str]]:
    """A message with the conversation before it, as chat templates take them; completions are no part of it."""
    messages = [] if system is None else [{"role": "system", "content": system}]
    for each in before:
        if each.form.mode == "chat":
            messages += [{"role": "user", "content": each.message}, {"role": "assistant", "content": each.answer}]
    return [*messages, {"role": "user", "content": message}]


_FORMAT = "jaxsteer chat 1"


@dataclass(frozen=True)
class _Message:
    """A message in a file; all but role and content are of answers."""

    role: Literal["system", "user", "assistant"]
    content: str
    model: str | None = None
    strength: Mapping[str, float] = field(default_factory=dict)
    mode: Mode = "chat"
    template: str = "{prompt}"
    finished: str = "stop"
    tokens: tuple[int, ...] = ()

    def exchange(self, message: str, system: str | None) -> Exchange:
        """The answer with what it answers."""
        form, voice = Form(self.mode, system, self.template), Voice(self.model, self.strength)
        return Exchange(message, form, voice, self.content, self.tokens, self.finished)


@dataclass(frozen=True)
class _Saved:
    """The content of a file."""

    format: Literal["jaxsteer chat 1"]
    model: str
    messages: tuple[_Message, ...]


def save(path: Path, exchanges: Sequence[Exchange], model: str) -> None:
    """Write a conversation as JSON; a file that holds none is not replaced.

    Args:
        path: *.json.
        exchanges: the conversation.
        model: name of the base model.

    Raises:
        ValueError: another name, no such folder, or a file that holds something else.
    """
    if path.suffix != ".json":
        raise ValueError(f"{path}: conversations are saved as JSON; give a name that ends in .json")
    if not path.resolve().parent.is_dir():
        raise ValueError(f"{path}: there is no folder {path.parent}")
    if path.exists() and not _is_conversation(path):
        raise ValueError(f"{path}: exists and holds no conversation; give another name")
    system, messages = None, list[dict[str, Any]]()
    for each in exchanges:
        if each.form.system != system:
            system = each.form.system
            messages.append({"role": "system", "content": system or ""})
        messages += [{"role": "user", "content": each.message}, to_plain(_reply(each))]
    with replacing(path) as file:
        saved = {"format": _FORMAT, "model": model, "messages": messages}
        file.write(json.dumps(saved, indent=1, ensure_ascii=False).encode())


def _reply(each: Exchange) -> _Message:
    form, voice = each.form, each.voice
    asked = (voice.model, voice.strength, form.mode, form.template)
    return _Message("assistant", each.answer, *asked, each.finished, each.tokens)


def _is_conversation(path: Path) -> bool:
    try:
        return read_json(path).get("format") == _FORMAT
    except ValueError:
        return False


def load(path: Path, model: str, vocab_size: int) -> tuple[list[Exchange], str]:
    """Read a conversation.

    Args:
        path: as /save wrote it.
        model: name of the base model that goes on with it; the token ids of another are left out.
        vocab_size: of this model.

    Returns:
        The exchanges, and the name of the base model that they were with.

    Raises:
        ValueError: no such file, or not a saved conversation; the message says where.
    """
    data = read_json(path)
    if data.get("format") != _FORMAT:
        raise ValueError(f"{path}: not a conversation that /save wrote (its format is not {_FORMAT!r})")
    saved = from_plain(_Saved, data, str(path))
    messages = [each if saved.model == model else replace(each, tokens=()) for each in saved.messages]
    if not all(0 <= token < vocab_size for each in messages for token in each.tokens):
        raise ValueError(f"{path}: has token ids that {model} does not have")
    exchanges, system, asked = list[Exchange](), None, None
    for number, each in enumerate(messages):
        if (each.role == "assistant") != (asked is not None):
            raise ValueError(f"{path}: messages[{number}]: users' messages and answers must take turns")
        if each.role == "system":
            system = each.content or None
        elif each.role == "user":
            asked = each.content
        else:
            assert asked is not None
            exchanges.append(each.exchange(asked, system))
            asked = None
    if asked is not None:
        raise ValueError(f"{path}: the last message has no answer")
    return exchanges, saved.model
