"""Preferences as a task: your own pairs, or right and wrong answers to the questions of another task."""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from train.data import Example, Split, Turn
from train.data.fields import show
from train.data.loading import load
from train.data.preference_rows import (
    EXPECTED,
    PreferenceKeys,
    PreferenceReading,
    Side,
    answer_example,
    last_turn_counts,
    sides_of,
)
from train.data.records import Part, Recipe
from train.tasks.listops import ListOpsTask
from train.tasks.mixture import PlainTask
from train.tasks.protocols import typed_template
from train.tasks.remade import Remade
from train.tasks.row_records import OnEmpty, RowRecords, check_on_empty
from train.tasks.rows import read_hub, read_records
from train.tasks.scoring import Rule, check_max_new_tokens, score

_NONE: dict[Side, str] = {
    "chosen": "no chosen answer, and none whose label is true",
    "rejected": "no rejected answer, and none whose label is false: there is nothing to tell the others from",
}


@dataclass(frozen=True)
class PreferenceTask:
    """Preferences (.jsonl, .parquet, or a hub data set): pairs of answers, or answers with a label.

    docs/preference_data.md shows the kinds of row.
    """

    train: str = "train"
    """File of training examples, a folder of them, or a pattern such as shards/*.parquet; with data, a split of that
    data set, e.g. train_prefs."""
    validation: str | None = None
    """Validation examples, in the same form; None = no evaluation during training."""
    test: str | None = None
    """Test examples, in the same form; None = the validation examples."""
    data: str | None = None
    """Id of a hub data set; None = train, validation and test are local files."""
    subset: str | None = None
    """Configuration of the hub data set."""
    keys: PreferenceKeys = field(default_factory=PreferenceKeys)
    """Keys (columns) of a row."""
    template: str = "{prompt}"
    """Text around a prompt; must contain {prompt}."""
    chat: bool = False
    """Use the model's chat template; required for conversations."""
    rule: Rule = "exact"
    """Rule that extracts the answer from an output, see docs/tasks.md."""
    max_new_tokens: int = 64
    """Maximum number of tokens in an answer."""
    on_empty: OnEmpty = "error"
    """What to do with rows that lack a text, or whose two answers are the same or answer different prompts: stop with
    an error, or drop and count them."""

    def __post_init__(self) -> None:
        """Reject settings that no file could suit."""
        check_on_empty(self.on_empty)
        check_max_new_tokens(self.max_new_tokens)
        if "{prompt}" not in self.template:
            raise ValueError(f"template: got {self.template!r}, it must contain {{prompt}}")

    def load(self, split: Split) -> list[Example]:
        """The wanted answers of a split; empty if it has no file.

        Raises:
            ValueError: naming file and line: a line that is no preference.
        """
        return load(self.recipe(split))

    def recipe(self, split: Split) -> Recipe:
        """The wanted answers of a split, read when they are needed."""
        return self._side(split, "chosen")

    def rejected(self, split: Split) -> Recipe:
        """The answers that are not wanted: of pairs, in the order of `recipe`."""
        return self._side(split, "rejected")

    def _side(self, split: Split, side: Side) -> Recipe:
        name = {"train": self.train, "validation": self.validation, "test": self.test or self.validation}[split]
        if name is None:
            return Recipe(())
        place = name if self.data is None else f"{self.data} {name}"
        reading = PreferenceReading(self.keys, self.template, self.chat)
        records = RowRecords(
            read_records(name) if self.data is None else read_hub(self.data, name, subset=self.subset),
            lambda source, row: answer_example(row, source, reading, side),
            f"{place} ({side} answers)",
            self.on_empty,
            repr((reading, side)),
            missing=f"{place}: {_NONE[side]}; expected rows such as {EXPECTED}",
            wanted=lambda row: side in sides_of(row, self.keys),
            fault="an empty or missing text, or no pair of different answers to one prompt",
        )
        return Recipe((Part(records),))


@dataclass(frozen=True)
class PairedTask:
    """Pairs of the right answer and a wrong one to the questions of another task.

    Where a question has choices, the wrong answer is another choice; else the number in the right answer is replaced by
    another one. Which one depends on the question and the seed alone.
    """

    of: PlainTask = field(default_factory=ListOpsTask)
    """The task; its answers must be choices or contain a number."""
    seed: int = 0
    """Random seed of the wrong answers."""

    @property
    def chat(self) -> bool:
        """Whether prompts go through the model's chat template."""
        return self.of.chat

    @property
    def rule(self) -> Rule:
        """Rule that extracts the answer from an output."""
        return self.of.rule

    @property
    def max_new_tokens(self) -> int:
        """Maximum number of tokens in an answer."""
        return self.of.max_new_tokens

    @property
    def template(self) -> str:
        """Text around a prompt that a user types."""
        return self.of.template

    @property
    def typed_template(self) -> str:
        """Text around a prompt that a user types, as the task knows it from its data."""
        return typed_template(self.of)

    def load(self, split: Split) -> list[Example]:
        """The right answers of a split."""
        return load(self.recipe(split))

    def recipe(self, split: Split) -> Recipe:
        """The right answers of a split, read when they are needed."""
        return self._remade(split, right_answer, "right")

    def rejected(self, split: Split) -> Recipe:
        """The wrong answers of a split, in the order of `recipe`."""
        return self._remade(
            split, lambda example: wrong_answer(right_answer(example), self.rule, self.seed), f"wrong {self.seed}"
        )

    def _remade(self, split: Split, make: Callable[[Example], Example], name: str) -> Recipe:
        recipe = self.of.recipe(split)
        parts = tuple(Part(Remade(records, make, name), prefix) for records, prefix in recipe.parts)
        return Recipe(parts, recipe.choose)


def right_answer(example: Example) -> Example:
    """The example as the better half of a pair: only its last turn counts.

    Raises:
        ValueError: naming the source: it has no answer, or a weight of its own, which a pair cannot have.
    """
    if not (example.turns and example.turns[-1].supervised):
        raise ValueError(f"{example.source}: has no answer; pairs are made of right answers")
    if example.weight != 1 or example.turn_weights:
        raise ValueError(f"{example.source}: has a weight other than 1; pairs have none")
    return last_turn_counts(example)


def wrong_answer(example: Example, rule: Rule, seed: int) -> Example:
    """The example with a wrong answer in its last turn.

    Args:
        example: with its right answer.
        rule: reads an answer from a text.
        seed: of the choice among wrong answers.

    Raises:
        ValueError: naming the source: it has neither choices nor a number that its answer is read from.
    """
    text, gold = example.turns[-1].text, example.gold or ""
    draw = random.Random(f"{seed} {[turn.text for turn in example.turns]}")
    right = [choice for choice in example.choices if score(choice, gold, rule)]
    if others := [choice for choice in example.choices if choice not in right]:
        shown = next((choice for choice in right if text.endswith(choice)), text)
        other = draw.choice(others)
        changed = text.removesuffix(shown) + other
        return _ending(example, other if score(changed, gold, rule) else changed)  # the reasoning may tell the answer
    for number in reversed(list(re.finditer(r"\d+", text))):
        changed = text[: number.start()] + _other_number(number.group(), draw) + text[number.end() :]
        if not score(changed, gold, rule):
            return _ending(example, changed)
    raise ValueError(
        f"{example.source}: no wrong answer can be made: it has no choices, and no number in {show(text)} that the "
        f"rule {rule!r} reads; use a PreferenceTask with answers of your own"
    )


def _other_number(digits: str, draw: random.Random) -> str:
    """Another number of as many digits."""
    other = digits
    while other == digits:
        first = draw.choice("0123456789" if len(digits) == 1 else "123456789")
        other = first + "".join(draw.choices("0123456789", k=len(digits) - 1))
    return other


def _ending(example: Example, text: str) -> Example:
    """The example with another text as its last turn; its gold answer stays."""
    last = Turn(example.turns[-1].role, text)
    return replace(example, turns=(*example.turns[:-1], last), answer=example.gold)
