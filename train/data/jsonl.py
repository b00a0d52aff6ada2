"""User data as JSON Lines: each line holds a prompt with its completion, or a conversation."""

from __future__ import annotations

import reprlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from train.data.examples import Example, Turn
from train.data.text_files import json_lines

_CHAT_ROLES = ("system", "user", "assistant")
# Keys that would change what is trained on: refused rather than silently ignored.
_UNSUPPORTED = ("tool_calls", "function_call", "weight")

# Values in error messages are abbreviated, and nested only a few levels deep.
_ABBREVIATED = reprlib.Repr()
_ABBREVIATED.maxstring = _ABBREVIATED.maxother = _ABBREVIATED.maxlong = 60


@dataclass(frozen=True)
class Keys:
    """The JSON keys of a line."""

    prompt: str = "prompt"
    """Key of the prompt, a string."""
    completion: str = "completion"
    """Key of the completion, a string."""
    answer: str = "answer"
    """Key of the gold answer for scoring, a string or a number; optional in each line."""
    messages: str = "messages"
    """Key of a conversation, a list of {"role", "content"}."""


def read_jsonl(
    path: str | Path, keys: Keys | None = None, *, template: str = "{prompt}", completions: bool = True
) -> list[Example]:
    """Read examples, one JSON object per line; blank lines are skipped.

    A line is either {"prompt": ..., "completion": ...} or {"messages": [{"role": ..., "content": ...}, ...]}. The
    completion, or every assistant message, is supervised. Other keys are ignored.

    Args:
        path: a UTF-8 file.
        keys: names of the keys; None for the default names.
        template: text around a plain prompt, e.g. "{prompt}\\n" if nothing else separates it from the completion.
        completions: require a completion, or a final assistant message, in every line. False reads prompts to
            generate from; completions are still accepted.

    Returns:
        The examples in file order; each `source` is "path:line".

    Raises:
        ValueError: naming file and line: a line that is not an example. Naming the file: no examples in it.
    """
    keys = keys or Keys()
    if "{prompt}" not in template:
        raise ValueError(f"template: got {template!r}, it must contain {{prompt}}")
    examples = []
    for source, row in json_lines(path):
        if keys.messages in row and keys.prompt in row:
            raise ValueError(
                f"{source}: has both {keys.messages!r} and {keys.prompt!r}; a line is either a chat "
                "or a prompt with its completion"
            )
        if keys.messages in row:
            turns = chat_turns(row[keys.messages], keys.messages, source, completions)
        else:
            turns = _plain_turns(row, keys, source, template, completions)
        examples.append(Example(turns, source, _answer(row, keys, source)))
    if not examples:
        raise ValueError(f"{path}: no examples; expected one JSON object per line, e.g. {_expected(keys)}")
    return examples


def _expected(keys: Keys) -> str:
    """An example of each kind of line, for error messages."""
    chat = '{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}'
    return f'{{"{keys.prompt}": "...", "{keys.completion}": "..."}} or {{"{keys.messages}": [{chat}]}}'


def _plain_turns(row: dict[str, Any], keys: Keys, source: str, template: str, completions: bool) -> tuple[Turn, ...]:
    """The turns of a prompt with its completion."""
    required = (keys.prompt, keys.completion) if completions else (keys.prompt,)
    for key in required:
        if key not in row:
            raise ValueError(f"{source}: no key {key!r}, got {sorted(row)}; expected {_expected(keys)}")
    turns = [Turn("prompt", template.replace("{prompt}", _text(row[keys.prompt], keys.prompt, source)))]
    if keys.completion in row:
        turns.append(Turn("completion", _text(row[keys.completion], keys.completion, source)))
    return tuple(turns)


def chat_turns(messages: Any, key: str, source: str, completions: bool = True) -> tuple[Turn, ...]:
    """The turns of a conversation.

    Args:
        messages: a list of {"role": ..., "content": ...} with the roles system (first message only), user and
            assistant.
        key: name of the list, for error messages.
        source: where the list was read, for error messages.
        completions: require the last message to be the assistant's.

    Raises:
        ValueError: naming the source and the message: not such a list.
    """
    if not isinstance(messages, list) or not messages:
        raise ValueError(f"{source}: {key!r} must be a list of at least one message, got {_show(messages)}")
    turns = tuple(_chat_turn(message, f"{key}[{i}]", source, first=i == 0) for i, message in enumerate(messages))
    if completions and turns[-1].role != "assistant":
        raise ValueError(
            f"{source}: {key!r} ends with role {turns[-1].role!r}; the last message must be the assistant's, "
            "because only assistant messages are trained on"
        )
    return turns


def _chat_turn(message: Any, name: str, source: str, *, first: bool) -> Turn:
    """The turn of one message."""
    if not isinstance(message, dict) or "role" not in message or "content" not in message:
        raise ValueError(f'{source}: {name} must be an object {{"role": ..., "content": ...}}, got {_show(message)}')
    role = message["role"]
    if role not in _CHAT_ROLES:
        raise ValueError(
            f"{source}: {name} has role {_show(role)}, allowed are {', '.join(_CHAT_ROLES)} "
            "(tool messages are not supported)"
        )
    if unsupported := [key for key in _UNSUPPORTED if message.get(key) is not None]:
        raise ValueError(
            f"{source}: {name} has {unsupported}, which is not supported; put what the assistant should say "
            "into 'content', or leave the conversation out"
        )
    if role == "system" and not first:
        raise ValueError(f"{source}: {name} has role 'system', allowed only as the first message")
    return Turn(role, _text(message["content"], f"{name}.content", source, empty=role == "system"))


def _text(value: Any, name: str, source: str, empty: bool = False) -> str:
    """A value that must be a string, and not empty unless allowed."""
    if not isinstance(value, str):
        raise ValueError(f"{source}: {name!r} must be a string, got {_show(value)}")
    if not value and not empty:
        raise ValueError(f"{source}: {name!r} is empty")
    return value


def _answer(row: dict[str, Any], keys: Keys, source: str) -> str | None:
    """The gold answer of a line, if it has one under its own key."""
    value = row.get(keys.answer)
    if value is None or keys.answer == keys.completion:
        return None
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise ValueError(f"{source}: {keys.answer!r} must be a string or a number, got {_show(value)}")
    return str(value)


def _show(value: Any) -> str:
    """A value, abbreviated to fit into a message."""
    text = _ABBREVIATED.repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
