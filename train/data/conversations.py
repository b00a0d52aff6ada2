"""Conversations in a row of data: lists of messages, as OpenAI's fine-tuning format or ShareGPT writes them."""

from __future__ import annotations

from typing import Any, NamedTuple

from train.data.examples import Role, Turn
from train.data.fields import EmptyText, as_weight, show, valid

_ROLES: dict[str, Role] = {"system": "system", "user": "user", "assistant": "assistant"}
_SHAREGPT_ROLES: dict[str, Role] = _ROLES | {"human": "user", "gpt": "assistant", "chatgpt": "assistant"}

KNOWN = ("role", "content", "from", "value", "weight", "name")
"""Keys of a message that are read, or whose meaning needs nothing done."""

# Keys that would change what is trained on: refused rather than silently ignored.
_UNSUPPORTED = ("tool_calls", "function_call", "train")


class Conversation(NamedTuple):
    """The turns of a conversation, with the weight of each one in the loss; no weights if all are 1."""

    turns: tuple[Turn, ...]
    weights: tuple[float, ...] = ()


def read_conversation(messages: Any, key: str, completions: bool = True) -> Conversation:
    """The turns of a conversation.

    Args:
        messages: a list of {"role": ..., "content": ...} with the roles system (first message only), user and
            assistant, or of {"from": ..., "value": ...} with system, human and gpt. An assistant's message may have
            a weight, 0 or 1: whether it is trained on.
        key: name of the list, for error messages.
        completions: require the last message to be the assistant's.

    Raises:
        ValueError: naming the message: not such a list. EmptyText if a message is empty, or the last one is not the
            assistant's.
    """
    if messages is None or (isinstance(messages, list) and not messages):
        raise EmptyText(f"{key!r} must be a list of at least one message, got {show(messages)}")
    if not isinstance(messages, list):
        raise ValueError(f"{key!r} must be a list of at least one message, got {show(messages)}")
    read = [_read_message(message, f"{key}[{i}]", first=i == 0) for i, message in enumerate(messages)]
    turns, weights = tuple(turn for turn, _ in read), tuple(weight for _, weight in read)
    if turns[0].role == "assistant":
        raise ValueError(f"{key!r} begins with the assistant; the first message must be the user's or the system's")
    if completions and turns[-1].role != "assistant":
        raise EmptyText(
            f"{key!r} ends with role {turns[-1].role!r}; the last message must be the assistant's, "
            "because only assistant messages are trained on"
        )
    answers = [weight for turn, weight in read if turn.role == "assistant"]
    if answers and not any(answers):
        raise EmptyText(f"{key!r}: every assistant message has weight 0, so there is nothing to train on")
    return Conversation(turns, weights if set(weights) != {1.0} else ())


def _read_message(message: Any, name: str, *, first: bool) -> tuple[Turn, float]:
    """The turn of one message, and its weight."""
    roles, keys = (_SHAREGPT_ROLES, ("from", "value")) if _is_sharegpt(message) else (_ROLES, ("role", "content"))
    if not isinstance(message, dict) or any(key not in message for key in keys):
        raise ValueError(f'{name} must be an object {{"role": ..., "content": ...}}, got {show(message)}')
    said, text = (message[key] for key in keys)
    role = roles.get(said) if isinstance(said, str) else None
    if role is None:
        raise ValueError(
            f"{name} has role {show(said)}, allowed are {', '.join(roles)} (tool messages are not supported)"
        )
    if unsupported := [key for key in _UNSUPPORTED if message.get(key) is not None]:
        raise ValueError(
            f"{name} has {unsupported}, which is not supported; put what the assistant should say into 'content', "
            'leave an assistant message out of the loss with "weight": 0, or leave the conversation out'
        )
    if role == "system" and not first:
        raise ValueError(f"{name} has role 'system', allowed only as the first message")
    weight = as_weight(message.get("weight"), f"{name}.weight")
    if role != "assistant" and weight not in (0.0, 1.0):
        raise ValueError(f"{name}.weight is {weight:g}, but only assistant messages are trained on")
    return Turn(role, string(text, f"{name}.{keys[1]}", empty=role == "system")), weight


def _is_sharegpt(message: Any) -> bool:
    """Whether a message is written as ShareGPT's: {"from": ..., "value": ...}."""
    return isinstance(message, dict) and "from" in message and "role" not in message


def string(value: Any, name: str, *, empty: bool = False) -> str:
    """A value that must be a string, and not empty unless allowed.

    Raises:
        ValueError: naming the field. EmptyText if it is empty or null.
    """
    if value is None:
        raise EmptyText(f"{name!r} must be a string, got null")
    if not isinstance(value, str):
        raise ValueError(f"{name!r} must be a string, got {show(value)}")
    if not value and not empty:
        raise EmptyText(f"{name!r} is empty")
    return valid(value, name)
