"""User data as JSON Lines: each line is a prompt with its completion, a conversation, an instruction or a text."""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Literal

from train.data.conversations import KNOWN, Conversation, read_conversation, string
from train.data.examples import Example, Turn
from train.data.fields import EmptyText, as_text, as_weight, is_missing, located
from train.data.records import Tally
from train.data.text_files import json_lines

Row = Mapping[str, Any]

Shape = Literal["conversation", "prompt", "ShareGPT", "Alpaca", "text"]
"""What a line holds, by its keys."""

CONVERSATIONS, ALPACA, ALPACA_INPUT = "conversations", ("instruction", "output"), "input"
"""Keys of ShareGPT and of Alpaca, whose names are fixed."""

MAX_NAMED = 8
"""Keys that are named in a note, at most."""

_ALPACA_LEAD = "Below is an instruction that describes a task"
_ALPACA_END = "\n\n### Response:\n"
ALPACA_TEMPLATE = (
    f"{_ALPACA_LEAD}. Write a response that appropriately completes the request.\n\n"
    f"### Instruction:\n{{prompt}}{_ALPACA_END}"
)
"""The prompt of Alpaca's authors for an instruction without an input."""

ALPACA_INPUT_TEMPLATE = (
    f"{_ALPACA_LEAD}, paired with an input that provides further context. Write a response that appropriately "
    f"completes the request.\n\n### Instruction:\n{{prompt}}\n\n### Input:\n{{input}}{_ALPACA_END}"
)
"""The prompt of Alpaca's authors for an instruction with an input."""


@dataclass(frozen=True)
class Keys:
    """The JSON keys of a line."""

    prompt: str = "prompt"
    """Key of the prompt, a string."""
    completion: str = "completion"
    """Key of the completion, a string."""
    answer: str = "answer"
    """Key of the gold answer for scoring, a string, a number or a boolean; optional in each line."""
    messages: str = "messages"
    """Key of a conversation, a list of {"role", "content"}."""
    text: str = "text"
    """Key of a plain text, learned as a whole."""
    weight: str = "weight"
    """Key of the example's weight in the loss, a number; optional in each line, 1 where it is absent."""


@dataclass(frozen=True)
class Reading:
    """How the lines of a file are read."""

    keys: Keys = field(default_factory=Keys)
    """Names of the keys."""
    template: str = "{prompt}"
    """Text around a plain prompt, e.g. "{prompt}\\n" if nothing else separates it from the completion."""
    chat: bool = False
    """Instructions become messages of a chat, rather than Alpaca's own prompt."""
    completions: bool = True
    """Require a completion, or a final assistant message, in every line. False reads prompts to generate from;
    completions are still accepted."""

    def __post_init__(self) -> None:
        """Reject a template without a place for the prompt."""
        if "{prompt}" not in self.template:
            raise ValueError(f"template: got {self.template!r}, it must contain {{prompt}}")


def read_jsonl(
    path: str | Path,
    keys: Keys | None = None,
    *,
    template: str = "{prompt}",
    chat: bool = False,
    completions: bool = True,
) -> list[Example]:
    """Read examples, one JSON object per line; blank lines are skipped.

    A line is one of the shapes of `shape_of`. The completion, or every assistant message, is supervised. Other keys
    are ignored; `notes_of` names them.

    Args:
        path: a UTF-8 file.
        keys: names of the keys; None for the default names.
        template, chat, completions: as in `Reading`.

    Returns:
        The examples in file order; each `source` is "path:line".

    Raises:
        ValueError: naming file and line: a line that is not an example. Naming the file: no examples in it.
    """
    reading = Reading(Keys() if keys is None else keys, template, chat, completions)
    return [make_example(row, source, reading) for source, row in read_rows(path, reading.keys)]


def read_rows(path: str | Path, keys: Keys) -> list[tuple[str, Row]]:
    """The lines of a file with their sources, "path:line".

    Raises:
        ValueError: naming file and line: a line that is not an object. Naming the file: no lines.
    """
    rows: list[tuple[str, Row]] = list(json_lines(path))
    if not rows:
        raise ValueError(no_lines(path, keys))
    return rows


def no_lines(path: str | Path, keys: Keys) -> str:
    """What to say about a file without lines."""
    return f"{path}: no examples; expected one JSON object per line, e.g. {_expected(keys)}"


@cache
def _shapes(keys: Keys) -> dict[Shape, tuple[tuple[str, ...], tuple[str, ...]]]:
    """For each shape, in order of preference, the keys that mark it and the others that it reads."""
    return {
        "conversation": ((keys.messages,), ()),
        "prompt": ((keys.prompt,), (keys.completion,)),
        "ShareGPT": ((CONVERSATIONS,), ()),
        "Alpaca": (ALPACA, (ALPACA_INPUT,)),
        "text": ((keys.text,), ()),
    }


def shape_of(row: Row, keys: Keys) -> Shape | None:
    """What a line holds, by the keys that it has; None for something else.

    In this order: a conversation, a prompt, a ShareGPT conversation, an Alpaca instruction, a text. A key with null
    counts only if there is no other.
    """
    for present in (lambda key: row.get(key) is not None, lambda key: key in row):
        for shape, (marks, _) in _shapes(keys).items():
            if all(map(present, marks)):
                return shape
    return None


def make_example(row: Row, source: str, reading: Reading) -> Example:
    """The example of one line.

    Args:
        row: the line's object.
        source: "path:line".
        reading: names of the keys, and how prompts are worded.

    Raises:
        ValueError: naming the source: not an example. EmptyText if a text is missing.
    """
    keys = reading.keys
    with located(source):
        conversation = _turns(row, reading)
        answer = None if keys.answer == keys.completion else row.get(keys.answer)
        return Example(
            conversation.turns,
            source,
            None if is_missing(answer) else as_text(answer, keys.answer),
            weight=as_weight(row.get(keys.weight), keys.weight),
            turn_weights=conversation.weights,
        )


def _turns(row: Row, reading: Reading) -> Conversation:
    """The turns of a line, with their weights."""
    keys = reading.keys
    shape = shape_of(row, keys)
    if shape == "conversation" and row.get(keys.prompt) is not None:
        raise ValueError(
            f"has both {keys.messages!r} and {keys.prompt!r}; a line is either a chat or a prompt with its completion"
        )
    if shape == "conversation":
        return read_conversation(row[keys.messages], keys.messages, reading.completions)
    if shape == "ShareGPT":
        return read_conversation(row[CONVERSATIONS], CONVERSATIONS, reading.completions)
    if shape == "Alpaca":
        return Conversation(_alpaca_turns(row, reading))
    if shape == "text":
        return Conversation((Turn("text", string(row[keys.text], keys.text)),))
    return Conversation(_plain_turns(row, reading))


def _plain_turns(row: Row, reading: Reading) -> tuple[Turn, ...]:
    """The turns of a prompt with its completion."""
    keys = reading.keys
    for key in (keys.prompt, keys.completion) if reading.completions else (keys.prompt,):
        if key not in row:
            kind = EmptyText if keys.prompt in row else ValueError
            raise kind(f"no key {key!r}, got {sorted(row)}; expected {_expected(keys)}")
    turns = [Turn("prompt", reading.template.replace("{prompt}", string(row[keys.prompt], keys.prompt)))]
    if keys.completion in row:
        turns.append(Turn("completion", string(row[keys.completion], keys.completion)))
    return tuple(turns)


def _alpaca_turns(row: Row, reading: Reading) -> tuple[Turn, ...]:
    """An instruction, with its input if it has one, in Alpaca's words, in the template given, or as messages."""
    (instruction, output), given = (string(row[name], name) for name in ALPACA), row.get(ALPACA_INPUT)
    given = "" if is_missing(given) else string(given, ALPACA_INPUT)
    if reading.chat or reading.template != "{prompt}":
        asked = reading.template.replace("{prompt}", f"{instruction}\n\n{given}" if given else instruction)
    else:
        template = ALPACA_INPUT_TEMPLATE if given else ALPACA_TEMPLATE
        before, _, after = template.partition("{prompt}")
        asked = before + instruction + after.replace("{input}", given)
    return (Turn("user", asked), Turn("assistant", output)) if reading.chat else Example.of(asked, output, "").turns


def _expected(keys: Keys) -> str:
    """An example of each kind of line, for error messages."""
    chat = '{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}'
    return (
        f'{{"{keys.prompt}": "...", "{keys.completion}": "..."}} or {{"{keys.messages}": [{chat}]}} or '
        f'{{"{keys.text}": "..."}}'
    )


def tally_of(rows: Iterable[tuple[str, Row]], keys: Keys) -> Tally:
    """What `notes_of` tells of some lines: shapes, weights and their range, answers, and keys that nothing reads."""
    tally = Tally()
    for _, row in rows:
        shape = shape_of(row, keys)
        tally.counts.update([f"shape {shape}"])
        weight = row.get(keys.weight)
        if isinstance(weight, int | float):
            tally.counts["weight"] += 1
            tally.low, tally.high = min(tally.low, weight), max(tally.high, weight)
        tally.counts["answer"] += not is_missing(row.get(keys.answer))
        tally.counts.update(f"{_UNUSED}{key}" for key in _unused(row, shape, keys))
    return tally


_UNUSED = "unused "


def notes_of(tally: Tally, reading: Reading, lines: int) -> list[str]:
    """What a reader of a file should know: formats found by name, weights, keys that nothing reads.

    Args:
        tally: of all its lines, see `tally_of`.
        reading: how they are read.
        lines: their number.
    """
    keys, counts = reading.keys, tally.counts
    asked = "as messages" if reading.chat else "in the task's template"
    if not reading.chat and reading.template == "{prompt}":
        asked = "in the words of Alpaca's own prompt"
    meaning: dict[Shape, str] = {
        "ShareGPT": f"ShareGPT conversations ({CONVERSATIONS})",
        "Alpaca": f"Alpaca instructions ({', '.join((*ALPACA, ALPACA_INPUT))}), asked {asked}",
        "text": f"plain texts ({keys.text}), learned as a whole",
    }
    found = {shape: counts[f"shape {shape}"] for shape in meaning}
    notes = [f"{found[shape]:,} {words}" for shape, words in meaning.items() if found[shape]]
    if counts["weight"]:
        ends = f"from {tally.low:g} to {tally.high:g}"
        notes.append(f"{counts['weight']:,} of {lines:,} lines have a {keys.weight!r} in the loss, {ends}")
    if 0 < counts["answer"] < lines and keys.answer != keys.completion:
        notes.append(f"{counts['answer']:,} of {lines:,} lines have an {keys.answer!r}")
    unused = Counter({key.removeprefix(_UNUSED): n for key, n in counts.items() if key.startswith(_UNUSED)})
    if unused:
        notes.append(f"not used: {_listed(unused, keys)}")
    return notes


def _unused(row: Row, shape: Shape | None, keys: Keys) -> Iterator[str]:
    """The keys of a line that nothing reads."""
    marks, others = _shapes(keys)[shape] if shape else ((), ())
    used = {*marks, *others, keys.answer, keys.weight}
    yield from (key for key, value in row.items() if value is not None and key not in used)
    messages = row[marks[0]] if shape in ("conversation", "ShareGPT") else ()
    said = {key for message in messages or () if isinstance(message, dict) for key in message}
    yield from (f"{key} (of a message)" for key in said.difference(KNOWN))


def _listed(counts: Counter[str], keys: Keys) -> str:
    """Keys with the number of lines that have them; suggests a similar name that is read."""
    named = []
    for key, count in counts.most_common(MAX_NAMED):
        near = difflib.get_close_matches(
            key.removesuffix(" (of a message)"), (keys.weight, keys.answer, keys.completion), 1, 0.75
        )
        named.append(f"{key[:40]!r} in {count:,}" + (f" (did you mean {near[0]!r}?)" if near else ""))
    return ", ".join(named) + (", ..." if len(counts) > MAX_NAMED else "")
