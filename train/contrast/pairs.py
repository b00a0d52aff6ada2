"""Pairs of texts: as they are read, and as tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np

from jaxsteer.io import Tokenizer
from jaxsteer.models.config import ModelConfig, check_length
from train.data import Encoding, Example, TokenizedExample, Turn, encode, encode_prompts
from train.data.conversations import read_conversation, string
from train.data.fields import located, show
from train.data.preference_rows import PreferenceReading, last_turn_counts, read_answers, sides_of
from train.data.text_files import json_lines

POSITIVE, NEGATIVE = "positive", "negative"

EXPECTED = (
    f'{{"{POSITIVE}": "...", "{NEGATIVE}": "..."}}, the same with lists of messages, or '
    '{"prompt": "...", "chosen": "...", "rejected": "..."}'
)
"""The kinds of row, for error messages."""


@dataclass(frozen=True)
class Pair:
    """Two texts that differ in a concept: two prompts, or two answers to one prompt.

    positive, negative  the sides
    answers             whether the last turn of each is an answer, which alone is compared
    """

    positive: Example
    negative: Example
    answers: bool

    @property
    def turns(self) -> tuple[tuple[Turn, ...], tuple[Turn, ...]]:
        """What both sides say."""
        return self.positive.turns, self.negative.turns

    @property
    def question(self) -> Example | None:
        """The prompt, if the sides are two answers to it."""
        same = self.positive.turns[:-1] == self.negative.turns[:-1]
        return self.positive.context if self.answers and same else None


def read_pairs(path: str, reading: PreferenceReading) -> list[Pair]:
    """The pairs of a JSON Lines file; lines with weight 0 are left out.

    Raises:
        ValueError: naming file and line: a line that is no pair, or whose sides are the same. Naming the file: fewer
            than 2 pairs.
    """
    pairs = [read_pair(row, source, reading) for source, row in json_lines(path) if sides_of(row, reading.keys)]
    if len(pairs) < 2:
        raise ValueError(f"{path}: has {len(pairs)} pair{'s'[: len(pairs) != 1]}, need at least 2, as {EXPECTED}")
    return pairs


def read_pair(row: Mapping[str, Any], source: str, reading: PreferenceReading) -> Pair:
    """The pair of a row.

    Raises:
        ValueError: naming the source: the row is no pair, or its sides are the same.
    """
    keys = reading.keys
    if not reading.chat and any(isinstance(value, list) for value in row.values()):
        raise ValueError(f"{source}: conversations need the model's chat template: give --chat")
    own = POSITIVE in row or NEGATIVE in row
    if own:
        if missing := [key for key in (POSITIVE, NEGATIVE) if key not in row]:
            raise ValueError(f"{source}: no key {missing[0]!r}, got {sorted(row)}; expected {EXPECTED}")
        reading = replace(reading, keys=replace(keys, chosen=POSITIVE, rejected=NEGATIVE))
    elif keys.chosen not in row and keys.rejected not in row:
        judged = "an answer with a label has one side only" if keys.label in row else f"got the keys {sorted(row)}"
        raise ValueError(f"{source}: no pair, {judged}; expected {EXPECTED}")
    if own and keys.prompt not in row:
        with located(source):
            return _texts(row, source, reading)
    positive, negative = read_answers(row, source, reading)
    assert positive is not None
    assert negative is not None
    return Pair(last_turn_counts(Example(positive, source)), last_turn_counts(Example(negative, source)), answers=True)


def _texts(row: Mapping[str, Any], source: str, reading: PreferenceReading) -> Pair:
    """The pair of two texts or conversations."""
    positive, negative = (_turns(row[key], key, reading) for key in (POSITIVE, NEGATIVE))
    if positive == negative:
        raise ValueError(f"{POSITIVE!r} and {NEGATIVE!r} are the same, {show(positive[-1].text)}")
    answered = [side[-1].role == "assistant" for side in (positive, negative)]
    if answered[0] != answered[1]:
        raise ValueError(f"one of {POSITIVE!r} and {NEGATIVE!r} ends with the assistant, the other with the user")
    as_example = lambda side: last_turn_counts(Example(side, source)) if answered[0] else Example(side, source)
    return Pair(as_example(positive), as_example(negative), answers=answered[0])


def _turns(value: Any, key: str, reading: PreferenceReading) -> tuple[Turn, ...]:
    if isinstance(value, list):
        return read_conversation(value, key, completions=False).turns
    asked = reading.template.replace("{prompt}", string(value, key))
    return (Turn("user" if reading.chat else "prompt", asked),)


class Sides(NamedTuple):
    """Pairs as tokens. What is compared of a side has weight 1 and is its completion."""

    positive: list[TokenizedExample]
    negative: list[TokenizedExample]


def encode_pairs(pairs: Sequence[Pair], tokenizer: Tokenizer, encoding: Encoding, config: ModelConfig) -> Sides:
    """Pairs as tokens: answers without the token that ends them, and prompts from where the two begin to differ.

    Raises:
        ValueError: naming file and line: the sides have the same tokens, or one is too long for the model.
    """
    found = Sides([], [])
    for pair in pairs:
        sides = [pair.positive, pair.negative]
        made = (encode if pair.answers else encode_prompts)(sides, tokenizer, encoding)[0]
        if np.array_equal(made[0].ids, made[1].ids):
            raise ValueError(f"{pair.positive.source}: the two sides have the same tokens")
        for side in made:
            check_length(config, len(side), side.source)
        if pair.answers:
            made = [_without_end(side) for side in made]
        else:
            shared = _shared(made)
            made = [_from(side, shared) for side in made]
            if min(map(len, made)) < 2:
                raise ValueError(f"{pair.positive.source}: a side has one token only, need at least 2")
        found.positive.append(made[0])
        found.negative.append(made[1])
    return found


def _without_end(example: TokenizedExample) -> TokenizedExample:
    """The token that ends an answer is the same on both sides, and does not count."""
    weights = example.weights.copy()
    if np.count_nonzero(weights) > 1:
        weights[np.flatnonzero(weights)[-1]] = 0
    return replace(example, weights=weights)


def _shared(sides: Sequence[TokenizedExample]) -> int:
    """Number of tokens with which both sides begin, at least 1 and at most all but one of the shorter."""
    n = min(map(len, sides))
    alike = sides[0].ids[:n] == sides[1].ids[:n]
    return max(1, min(n - 1, n if alike.all() else int(np.argmin(alike))))


def _from(example: TokenizedExample, start: int) -> TokenizedExample:
    """The example with what follows `start` as its completion."""
    completion = np.arange(len(example)) >= start
    return TokenizedExample(example.ids, completion, start, example.source)


class Divided(NamedTuple):
    """Numbers of the pairs that a vector is made of, and of those that decide on layer and strength."""

    train: np.ndarray
    validation: np.ndarray


def divide(count: int, share: float, seed: int) -> Divided:
    """Hold out a share of the pairs, at least 2; of fewer than 4, none: they decide themselves."""
    if count < 4:
        return Divided(np.arange(count), np.arange(count))
    held = min(count - 2, max(2, round(share * count)))
    order = np.random.default_rng(seed).permutation(count)
    return Divided(np.sort(order[held:]), np.sort(order[:held]))
