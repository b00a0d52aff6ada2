"""Rows of preference data: a chosen and a rejected answer to a prompt, or one answer and whether it is desirable."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple

from train.data.conversations import read_conversation, string
from train.data.examples import Example, Turn
from train.data.fields import EmptyText, as_weight, located, show

Row = Mapping[str, Any]

Side = Literal["chosen", "rejected"]
"""Which of a pair an answer is; chosen also means desirable where an answer is judged alone."""

_HUMAN, _ASSISTANT = "\n\nHuman:", "\n\nAssistant:"

EXPECTED = (
    '{"prompt": "...", "chosen": "...", "rejected": "..."}, the same with lists of messages, transcripts '
    '"\\n\\nHuman: ... \\n\\nAssistant: ..." as chosen and rejected, or '
    '{"prompt": "...", "completion": "...", "label": true}'
)
"""The kinds of row, for error messages."""


@dataclass(frozen=True)
class PreferenceKeys:
    """The JSON keys of a row."""

    prompt: str = "prompt"
    """Key of the prompt: a text, or a list of messages; absent where chosen and rejected are whole conversations."""
    chosen: str = "chosen"
    """Key of the answer that is preferred."""
    rejected: str = "rejected"
    """Key of the other answer."""
    completion: str = "completion"
    """Key of an answer that is judged by itself."""
    label: str = "label"
    """Key of the judgement of such an answer: true if it is desirable."""
    weight: str = "weight"
    """Key of the row's weight; 0 leaves the row out. Other weights than 0 and 1 are refused."""


@dataclass(frozen=True)
class PreferenceReading:
    """How rows are read: their keys, the text around a plain prompt, and whether texts become messages of a chat."""

    keys: PreferenceKeys = field(default_factory=PreferenceKeys)
    template: str = "{prompt}"
    chat: bool = False


class Answers(NamedTuple):
    """The answers of a row, as turns; None where the row has no such answer."""

    chosen: tuple[Turn, ...] | None
    rejected: tuple[Turn, ...] | None


def sides_of(row: Row, keys: PreferenceKeys) -> tuple[Side, ...]:
    """Which answers a row has, by its keys; none if its weight is 0. A malformed row has both: reading it fails."""
    with suppress(ValueError):
        if as_weight(row.get(keys.weight), keys.weight) == 0:
            return ()
        if keys.label in row and keys.chosen not in row:
            return ("chosen",) if _label(row, keys) else ("rejected",)
    return ("chosen", "rejected")


def read_answers(row: Row, source: str, reading: PreferenceReading) -> Answers:
    """The answers of a row.

    Raises:
        ValueError: naming the source: not such a row.
            EmptyText: a text is missing, both answers are the same, or they differ before their last message.
    """
    keys = reading.keys
    with located(source):
        if keys.label in row and keys.chosen not in row:
            turns = _answered(row.get(keys.prompt), _needed(row, keys.completion), keys.completion, reading)
            return Answers(turns, None) if _label(row, keys) else Answers(None, turns)
        chosen, rejected = (
            _answered(row.get(keys.prompt), _needed(row, key), key, reading) for key in (keys.chosen, keys.rejected)
        )
        if chosen[:-1] != rejected[:-1]:
            raise EmptyText(
                f"{keys.chosen!r} and {keys.rejected!r} differ before their last message; a pair is two answers to one "
                "prompt"
            )
        if chosen == rejected:
            raise EmptyText(f"{keys.chosen!r} and {keys.rejected!r} are the same answer, {show(chosen[-1].text)}")
        return Answers(chosen, rejected)


def answer_example(row: Row, source: str, reading: PreferenceReading, side: Side) -> Example:
    """The example of one answer of a row; only the last turn has a weight.

    Raises:
        ValueError: as `read_answers`; or a weight other than 0 and 1.
    """
    turns = getattr(read_answers(row, source, reading), side)
    with located(source):
        weight = as_weight(row.get(reading.keys.weight), reading.keys.weight)
        if weight not in (0.0, 1.0):
            raise ValueError(f"{reading.keys.weight!r} is {weight:g}; preferences have the weights 0 and 1 only")
    return last_turn_counts(Example(turns, source))


def last_turn_counts(example: Example) -> Example:
    """The example with targets in its last turn alone; earlier replies stay in it, flagged as such."""
    if not any(turn.supervised for turn in example.turns[:-1]):
        return example
    return replace(example, turn_weights=(*(0.0 if t.supervised else 1.0 for t in example.turns[:-1]), 1.0))


def _needed(row: Row, key: str) -> Any:
    if key not in row:
        raise ValueError(f"no key {key!r}, got {sorted(row)}; expected {EXPECTED}")
    return row[key]


def _label(row: Row, keys: PreferenceKeys) -> bool:
    label = row[keys.label]
    if isinstance(label, bool) or (isinstance(label, int) and label in (0, 1)):
        return bool(label)
    raise ValueError(f"{keys.label!r} must be true or false, got {show(label)}")


def _answered(prompt: Any, answer: Any, key: str, reading: PreferenceReading) -> tuple[Turn, ...]:
    """The turns of a prompt and an answer."""
    if isinstance(answer, list) or isinstance(prompt, list):
        return _conversation(prompt, answer, key, reading)
    if prompt is None:
        return _transcript(string(answer, key), key, reading)
    asked = reading.template.replace("{prompt}", string(prompt, reading.keys.prompt))
    roles = ("user", "assistant") if reading.chat else ("prompt", "completion")
    return Turn(roles[0], asked), Turn(roles[1], string(answer, key))  # type: ignore[arg-type]


def _conversation(prompt: Any, answer: Any, key: str, reading: PreferenceReading) -> tuple[Turn, ...]:
    """The turns of an answer that is messages: those behind the prompt, or the whole conversation."""
    if not reading.chat:
        raise ValueError("conversations need the model's chat template: give --task.chat")
    if isinstance(answer, str):
        answer = [{"role": "assistant", "content": answer}]
    if not isinstance(answer, list):
        raise ValueError(f"{key!r} must be a text or a list of messages, got {show(answer)}")
    whole = bool(answer) and _role(answer[0]) not in ("assistant", "gpt", "chatgpt")
    if whole and isinstance(prompt, list) and answer[: len(prompt)] != prompt:
        raise ValueError(f"{key!r} is a whole conversation, but does not begin with {reading.keys.prompt!r}")
    if whole:
        messages = answer
    elif isinstance(prompt, list):
        messages = [*prompt, *answer]
    else:
        asked = string(prompt, reading.keys.prompt)
        messages = [{"role": "user", "content": reading.template.replace("{prompt}", asked)}, *answer]
    return read_conversation(messages, key).turns


def _role(message: Any) -> Any:
    return message.get("role", message.get("from")) if isinstance(message, dict) else None


def _transcript(text: str, key: str, reading: PreferenceReading) -> tuple[Turn, ...]:
    """The turns of a transcript as Anthropic's HH data has them."""
    before, mark, answer = text.rpartition(_ASSISTANT)
    if not mark or not text.lstrip("\n").startswith(_HUMAN.strip()):
        raise ValueError(
            f"no key {reading.keys.prompt!r}, and {key!r} is not a transcript of {_HUMAN!r} and {_ASSISTANT!r}; "
            f"expected {EXPECTED}"
        )
    if _HUMAN in answer:
        raise EmptyText(f"{key!r} ends with the human; the last message must be the assistant's")
    if not answer.strip():
        raise EmptyText(f"{key!r} ends with an empty answer")
    if not reading.chat:
        return Turn("prompt", before + mark), Turn("completion", answer)
    turns = []
    for part in ("\n\n" + text.lstrip("\n")).split(_HUMAN)[1:]:
        asked, *answers = part.split(_ASSISTANT)
        turns.append({"role": "user", "content": asked.strip()})
        turns += [{"role": "assistant", "content": said.strip()} for said in answers]
    return read_conversation(turns, key).turns
