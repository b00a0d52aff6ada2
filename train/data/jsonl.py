"""The user's own data: one JSON object a line, a prompt with its completion or a chat."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from train.data.examples import Example, Turn

_CHAT_ROLES = ("system", "user", "assistant")
# Keys that would change what is trained: better refused than passed over.
_UNSUPPORTED = ("tool_calls", "function_call", "weight")


@dataclass(frozen=True)
class Keys:
    """Which keys of a line hold what.

    prompt, completion  texts of a plain example
    answer              gold answer for exact match, optional in a line (a string or a number)
    messages            the list of {"role", "content"} of a chat
    """

    prompt: str = "prompt"
    completion: str = "completion"
    answer: str = "answer"
    messages: str = "messages"


def read_jsonl(
    path: str | Path, keys: Keys | None = None, *, template: str = "{prompt}", completions: bool = True
) -> list[Example]:
    """Read examples, one JSON object a line; blank lines are passed over.

    A line is either {"prompt": ..., "completion": ...} or {"messages": [{"role": ..., "content": ...}, ...]};
    loss falls on the completion, or on every assistant message. Other keys of a line are ignored.

    Args:
        path: UTF-8 file.
        keys: Names of the keys; None = the names above.
        template: Text around a plain prompt, e.g. "{prompt}\\n" where nothing else separates it from the
            completion.
        completions: Whether every line must have a completion or end with an assistant message. False reads
            prompts to generate from and still accepts completions.

    Returns:
        Examples in the order of the file, their source "path:line".

    Raises:
        ValueError: with file and line, for a line of another form; where the file holds no example.
    """
    keys = keys or Keys()
    if "{prompt}" not in template:
        raise ValueError(f"template: got {template!r}, need a text that contains {{prompt}}")
    examples = []
    for where, row in json_lines(path):
        if keys.messages in row and keys.prompt in row:
            raise ValueError(
                f"{where}: has both {keys.messages!r} and {keys.prompt!r}; a line is either a chat "
                "or a prompt with its completion"
            )
        if keys.messages in row:
            turns = chat_turns(row[keys.messages], keys.messages, where, completions)
        else:
            turns = _plain(row, keys, where, template, completions)
        examples.append(Example(turns, where, _answer(row, keys.answer, keys.completion, where)))
    if not examples:
        raise ValueError(f"{path}: no examples; expected one JSON object a line, e.g. {_shape(keys)}")
    return examples


def json_lines(path: str | Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """("path:line", object) of every line that is not blank, one object a line.

    Raises:
        ValueError: with file and line, for a line that is not UTF-8 text or no JSON object.
    """
    with Path(path).open("rb") as file:
        for number, raw in enumerate(file, 1):
            where = f"{path}:{number}"
            row = _parse(raw, where, first=number == 1)
            if row is not None:
                yield where, row


def _shape(keys: Keys) -> str:
    """An example line, for messages."""
    chat = '{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}'
    return f'{{"{keys.prompt}": "...", "{keys.completion}": "..."}} or {{"{keys.messages}": [{chat}]}}'


def _parse(raw: bytes, where: str, first: bool) -> dict[str, Any] | None:
    """The object of one line; None for a blank one."""
    try:
        # Some editors begin a file with a byte order mark.
        text = raw.decode("utf-8-sig" if first else "utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{where}: not UTF-8 text ({error.reason} at byte {error.start})") from None
    if not text.strip():
        return None
    try:
        row = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{where}: not JSON ({error.msg} at column {error.colno}); expected one object on one line"
        ) from None
    if not isinstance(row, dict):
        raise ValueError(f"{where}: got a JSON {type(row).__name__}, expected an object")
    return row


def _plain(row: dict[str, Any], keys: Keys, where: str, template: str, completions: bool) -> tuple[Turn, ...]:
    """Turns of a prompt with its completion."""
    if keys.prompt not in row:
        raise ValueError(f"{where}: no key {keys.prompt!r}, got {sorted(row)}; expected {_shape(keys)}")
    turns = [Turn("prompt", template.replace("{prompt}", _text(row[keys.prompt], keys.prompt, where)))]
    if keys.completion in row:
        turns.append(Turn("completion", _text(row[keys.completion], keys.completion, where)))
    elif completions:
        raise ValueError(f"{where}: no key {keys.completion!r}, got {sorted(row)}; expected {_shape(keys)}")
    return tuple(turns)


def chat_turns(messages: Any, key: str, where: str, completions: bool = True) -> tuple[Turn, ...]:
    """Turns of a chat.

    Args:
        messages: a list of {"role": ..., "content": ...}, system (first or not at all), user and assistant.
        key: the list's name and where: its place, both for messages.
        completions: whether the last message must be the assistant's.

    Raises:
        ValueError: for anything else.
    """
    if not isinstance(messages, list) or not messages:
        raise ValueError(f"{where}: {key!r} must be a list of at least one message, got {_show(messages)}")
    turns: list[Turn] = []
    for i, message in enumerate(messages):
        name = f"{key}[{i}]"
        if not isinstance(message, dict) or "role" not in message or "content" not in message:
            raise ValueError(f'{where}: {name} must be an object {{"role": ..., "content": ...}}, got {_show(message)}')
        role = message["role"]
        if role not in _CHAT_ROLES:
            raise ValueError(
                f"{where}: {name} has role {_show(role)}, allowed are {', '.join(_CHAT_ROLES)} "
                "(tool messages are not supported)"
            )
        refused = [k for k in _UNSUPPORTED if message.get(k) is not None]
        if refused:
            raise ValueError(
                f"{where}: {name} has {refused}, which is not supported; write what the assistant is to say "
                "into 'content' or leave the conversation out"
            )
        if role == "system" and i > 0:
            raise ValueError(f"{where}: {name} has role 'system', allowed only as the first message")
        turns.append(Turn(role, _text(message["content"], f"{name}.content", where, empty=role == "system")))
    if completions and turns[-1].role != "assistant":
        raise ValueError(
            f"{where}: {key!r} ends with role {turns[-1].role!r}; the last message must be the assistant's, "
            "since only those are trained on"
        )
    return tuple(turns)


def _text(value: Any, name: str, where: str, empty: bool = False) -> str:
    """A string that is not empty."""
    if not isinstance(value, str):
        raise ValueError(f"{where}: {name!r} must be a string, got {_show(value)}")
    if not value and not empty:
        raise ValueError(f"{where}: {name!r} is empty")
    return value


def _answer(row: dict[str, Any], key: str, completion: str, where: str) -> str | None:
    """The gold answer of a line, where it has one of its own."""
    value = row.get(key)
    if value is None or key == completion:
        return None
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise ValueError(f"{where}: {key!r} must be a string or a number, got {_show(value)}")
    return str(value)


def _show(value: Any) -> str:
    """A value cut to a readable length."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
