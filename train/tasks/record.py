"""What a task is: where its rows come from, what a row asks, and how that is put into words."""

from __future__ import annotations

import math
import string
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np

from train.data.examples import Example, Turn
from train.tasks.scoring import Rule

Split = Literal["train", "validation", "test"]
Row = Mapping[str, Any]

SEED = 42
"""Of the shuffles that cut a split in two."""


class EmptyText(ValueError):
    """A row without a text where one is needed."""


class Option(NamedTuple):
    """A candidate answer: what names it, and its text, which a prompt lists (empty where the label says it all)."""

    label: str
    text: str = ""


@dataclass(frozen=True)
class Question:
    """What a row asks, before it is put into words.

    fields   texts that the templates of a record name
    answer   the gold answer, as the record's rule compares it
    options  the candidates, if the answer is to be chosen; `answer` is the label of one
    turns    of a conversation, which then is the whole example
    """

    fields: Mapping[str, str]
    answer: str
    options: tuple[Option, ...] = ()
    turns: tuple[Turn, ...] = ()

    @property
    def gold(self) -> Option | None:
        """The option that is right."""
        return next((option for option in self.options if option.label == self.answer), None)


@dataclass(frozen=True)
class Part:
    """Rows of one of the source's splits: all of them, or what some cuts leave.

    Each cut shuffles with seed 42, holds a share of the rows out, and goes on with those held out ("hold") or with
    the rest ("keep"); it draws the same rows as `shuffle(seed=42).train_test_split(share, seed=42)` of `datasets`.
    """

    split: str
    cuts: tuple[tuple[Literal["hold", "keep"], float], ...] = ()

    def chosen(self, rows: int) -> list[int]:
        """Indices out of so many rows."""
        index = np.arange(rows)
        for which, share in self.cuts:
            shuffle = np.random.default_rng(SEED).permutation(len(index))
            order = shuffle[np.random.default_rng(SEED).permutation(len(index))]
            held = math.ceil(share * len(index))
            index = index[order[:held] if which == "hold" else order[held:]]
        return index.tolist()

    def __str__(self) -> str:
        """E.g. "validation (80 %)"."""
        share = math.prod(share if which == "hold" else 1 - share for which, share in self.cuts)
        return f"{self.split} ({100 * share:.0f} %)" if self.cuts else self.split


@dataclass(frozen=True)
class Record:
    """One task. Templates hold {field} of the questions; {options} in a prompt is the list of candidates.

    title          for people
    source, subset the data set's id on the Hugging Face hub, and its configuration
    splits         where the rows of each split come from
    columns        that a row must have; more are ignored
    read           what a row asks; raises ValueError for a value that cannot be
    prompt         template of the prompt
    completion     template of what is trained on; may name the gold option's {label} and {text}
    rule           how an answer is read from an output, see `train.tasks.scoring`
    max_new_tokens that an answer may take
    choice         template of a candidate completion, where it is not `completion`
    option         template of a line in the list of candidates, with {label} and {text}
    between        what stands between two of these lines
    paraphrases    other prompts that ask for the same
    revision       of the data set's repository
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
    between: str = "\n"
    paraphrases: tuple[str, ...] = ()
    revision: str | None = None

    def ask(self, row: Row, source: str) -> Question:
        """What a row asks.

        Raises:
            ValueError: with its source, for a value that cannot be.
        """
        try:
            return self.read(row)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            reason = str(error) if isinstance(error, ValueError) else f"not a row of {self.source} ({error!r})"
            raise (EmptyText if isinstance(error, EmptyText) else ValueError)(f"{source}: {reason}") from None

    def example(self, question: Question, source: str, prompt: str | None = None) -> Example:
        """A question in words.

        Args:
            source: where it came from, for messages.
            prompt: another template than the record's.

        Raises:
            ValueError: the completion would be empty, or the answer is none of the options.
        """
        if question.turns:
            return Example(question.turns, source)
        gold = question.gold
        if question.options and gold is None:
            allowed = ", ".join(option.label for option in question.options)
            raise ValueError(f"{source}: the answer is {question.answer!r}, but the choices are {allowed}")
        lines = [fill(self.option, _named(option)) for option in question.options if option.text]
        values = {**question.fields, "answer": question.answer, "options": self.between.join(lines)}
        asked = fill(prompt or self.prompt, values)
        completion = fill(self.completion, {**values, **(_named(gold) if gold else {})})
        if not completion.strip():
            raise EmptyText(f"{source}: the completion is empty")
        choice = self.choice or self.completion
        choices = tuple(fill(choice, {**question.fields, **_named(option)}) for option in question.options)
        return Example.of(asked, completion, source, question.answer, choices)


def holes(template: str) -> list[str]:
    """Names between braces in a template, in order; {{ and }} stand for braces."""
    return [name for _, name, _, _ in string.Formatter().parse(template) if name is not None]


def fill(template: str, values: Mapping[str, str]) -> str:
    """A template with its holes filled; braces in the values stay as they are."""
    return "".join(
        text + (values[name] if name is not None else "") for text, name, _, _ in string.Formatter().parse(template)
    )


def _named(option: Option) -> dict[str, str]:
    """An option's values; `sentence` is its text with a full stop, `Label` its label with a capital."""
    text = option.text.strip()
    sentence = text if text.endswith((".", "!", "?")) else text + "."
    return {"label": option.label, "Label": option.label.capitalize(), "text": text, "sentence": sentence}
