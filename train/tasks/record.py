"""What defines a named task: where its rows come from, what a row asks, and how the question is put into words."""

from __future__ import annotations

import math
import string
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import numpy as np

from train.data.examples import Example, Split, Turn
from train.data.fields import EmptyText, located
from train.tasks.scoring import Rule

Row = Mapping[str, Any]
"""A row of a data set: its values by column."""

SEED = 42
"""Random seed of the shuffles that divide a split."""


class Option(NamedTuple):
    """A candidate answer: its label and its text, which a prompt lists (empty if the label says it all)."""

    label: str
    text: str = ""


@dataclass(frozen=True)
class Question:
    """What a row asks, before it is put into words.

    fields   texts for the placeholders of the record's templates
    answer   the gold answer, as the record's rule compares it
    options  the candidates of a multiple-choice question; `answer` is the label of one of them
    turns    the turns of a conversation, which then are the whole example
    turn_weights  of a conversation, as in `Example`
    """

    fields: Mapping[str, str]
    answer: str
    options: tuple[Option, ...] = ()
    turns: tuple[Turn, ...] = ()
    turn_weights: tuple[float, ...] = field(default=(), repr=False)  # perturbations depend on the repr

    @property
    def gold(self) -> Option | None:
        """The right option."""
        return next((option for option in self.options if option.label == self.answer), None)


@dataclass(frozen=True)
class Part:
    """Rows of one split of the source: all of them, or what remains after some cuts.

    Each cut shuffles the rows with seed 42, holds out a fraction of them, and continues with the rows held out
    ("hold") or with the rest ("keep"). It selects the same rows as `shuffle(seed=42).train_test_split(fraction,
    seed=42)` of the `datasets` library.
    """

    split: str
    cuts: tuple[tuple[Literal["hold", "keep"], float], ...] = ()

    def indices(self, rows: int) -> list[int]:
        """Indices of the rows of this part, in order.

        Args:
            rows: number of rows in the split.
        """
        indices = np.arange(rows)
        for side, fraction in self.cuts:
            shuffle = np.random.default_rng(SEED).permutation(len(indices))
            order = shuffle[np.random.default_rng(SEED).permutation(len(indices))]
            count = math.ceil(fraction * len(indices))
            indices = indices[order[:count] if side == "hold" else order[count:]]
        return indices.tolist()

    def __str__(self) -> str:
        """E.g. "validation (80 %)"."""
        share = math.prod(fraction if side == "hold" else 1 - fraction for side, fraction in self.cuts)
        return f"{self.split} ({100 * share:.0f} %)" if self.cuts else self.split


@dataclass(frozen=True)
class Record:
    """The definition of one task. The placeholders of its templates are the fields of a `Question`.

    title           name for readers of the documentation
    source          id of the data set on the Hugging Face hub
    splits          which rows of the source make up each split
    columns         columns that a row must have; others are ignored
    read            reads a row; raises ValueError for invalid values
    prompt          template of the prompt; {options} is the list of candidates
    completion      template of the completion; may use the gold option's {label}, {text} and {sentence}
    rule            rule that extracts the answer from an output, see `train.tasks.scoring`
    max_new_tokens  default of the maximum number of tokens in an answer
    subset          configuration of the hub data set
    choice          template of a candidate completion, if it is not `completion`
    option          template of a candidate in the list, with {label} and {text}
    separator       text between two candidates in the list
    paraphrases     other prompt templates that ask the same
    revision        revision of the hub data set
    """

    title: str
    source: str
    splits: Mapping[Split, Part]
    columns: tuple[str, ...]
    read: Callable[[Row], Question]
    prompt: str
    completion: str
    rule: Rule
    max_new_tokens: int
    subset: str | None = None
    choice: str | None = None
    option: str = "({label}) {text}"
    separator: str = "\n"
    paraphrases: tuple[str, ...] = ()
    revision: str | None = None

    def ask(self, row: Row, source: str) -> Question:
        """Read a row.

        Args:
            row: a row of the data set.
            source: where the row was read, for error messages.

        Raises:
            ValueError: naming the source: an invalid value. EmptyText if a text is missing.
        """
        with located(source):
            try:
                return self.read(row)
            except (TypeError, KeyError, AttributeError) as error:
                raise ValueError(f"not a row of {self.source} ({error!r})") from None

    def example(self, question: Question, source: str, prompt: str | None = None) -> Example:
        """Put a question into words.

        Args:
            question: what a row asks.
            source: where the row was read, for error messages.
            prompt: a prompt template instead of the record's.

        Raises:
            ValueError: the answer is not among the options. EmptyText if the completion is empty.
        """
        if question.turns:
            return Example(question.turns, source, turn_weights=question.turn_weights)
        gold = question.gold
        if question.options and gold is None:
            allowed = ", ".join(option.label for option in question.options)
            raise ValueError(f"{source}: the answer is {question.answer!r}, but the choices are {allowed}")
        listed = self.separator.join(fill(self.option, _values(option)) for option in question.options if option.text)
        values = {**question.fields, "answer": question.answer, "options": listed}
        completion = fill(self.completion, {**values, **(_values(gold) if gold else {})})
        if not completion.strip():
            raise EmptyText(f"{source}: the completion is empty")
        choice = self.completion if self.choice is None else self.choice
        choices = tuple(fill(choice, {**question.fields, **_values(option)}) for option in question.options)
        asked = fill(self.prompt if prompt is None else prompt, values)
        return Example.of(asked, completion, source, question.answer, choices)


def placeholders(template: str) -> list[str]:
    """Names in braces in a template, in order; {{ and }} stand for literal braces."""
    return [name for _, name, _, _ in string.Formatter().parse(template) if name is not None]


def fill(template: str, values: Mapping[str, str]) -> str:
    """A template with its placeholders replaced; braces in the values are left alone."""
    return "".join(
        text + (values[name] if name is not None else "") for text, name, _, _ in string.Formatter().parse(template)
    )


def _values(option: Option) -> dict[str, str]:
    """The placeholders of an option; `sentence` is its text with a full stop, `Label` its label capitalised."""
    text = option.text.strip()
    sentence = text if text.endswith((".", "!", "?")) else text + "."
    return {"label": option.label, "Label": option.label.capitalize(), "text": text, "sentence": sentence}
