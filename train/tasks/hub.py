"""A named task, read from the Hugging Face hub or from local files with the same columns."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, NamedTuple, TypeVar, get_args

from jaxsteer.plans import did_you_mean
from train.data import Example, Split
from train.data.fields import EmptyText, as_weight, located
from train.display.console import say
from train.tasks.instructions import as_instructions
from train.tasks.record import Question, Record, Row, placeholders
from train.tasks.records import TASKS
from train.tasks.rows import Rows, check_columns, read_file, read_split
from train.tasks.scoring import Rule

OnEmpty = Literal["error", "drop"]
Item = TypeVar("Item")
Made = TypeVar("Made")


class SourcedQuestion(NamedTuple):
    """A question, the record that puts it into words, where its row was read, and its weight in the loss."""

    record: Record
    question: Question
    source: str
    weight: float = 1.0

    def example(self, prompt: str | None = None) -> Example:
        """The question in words, with another prompt template than the record's if one is given."""
        return replace(self.record.example(self.question, self.source, prompt), weight=self.weight)


@dataclass(frozen=True)
class HubTask:
    """A named task, see the list in docs/tasks.md."""

    name: str
    """Name of the task in the list of docs/tasks.md, e.g. gsm8k."""
    data: str | None = None
    """Copy to read instead of the original: a path with {split}, a folder of {split}.jsonl files, or a hub id."""
    train: str | None = None
    """Local file of training examples, used whole."""
    validation: str | None = None
    """Local file of validation examples, used whole."""
    test: str | None = None
    """Local file of test examples, used whole; None = the validation file, if any of the three files is given."""
    chat: bool = False
    """Use the model's chat template (always on for the task chat)."""
    max_new_tokens: int = 0
    """Maximum number of tokens in an answer; 0 = the task's default."""
    on_empty: OnEmpty = "error"
    """What to do with rows that lack a text or their answer: stop with an error, or drop and count them."""

    def __post_init__(self) -> None:
        """Reject an unknown name; fill in the settings that follow from it."""
        if self.name not in TASKS:
            hint = did_you_mean(self.name, TASKS)
            raise ValueError(f"task: there is no {self.name!r}{hint}; known are {', '.join(TASKS)}")
        check_on_empty(self.on_empty)
        if self.max_new_tokens < 0:
            raise ValueError(f"task.max_new_tokens must be at least 1, or 0 for the default; got {self.max_new_tokens}")
        if self.max_new_tokens == 0:
            object.__setattr__(self, "max_new_tokens", self.record.max_new_tokens)
        if self.name == "chat":
            object.__setattr__(self, "chat", True)

    @property
    def record(self) -> Record:
        """The definition of the task."""
        return TASKS[self.name]

    @property
    def rule(self) -> Rule:
        """Rule that extracts the answer from an output."""
        return self.record.rule

    @property
    def template(self) -> str:
        """Text around a prompt that a user types, if the task's prompt has a single placeholder; else "{prompt}"."""
        return user_template(self.record.prompt.replace("{given}", ""))

    def load(self, split: Split) -> list[Example]:
        """The examples of a split; empty if files are given, but none for this split.

        Raises:
            ValueError: a missing file, an unreachable hub, missing columns, or invalid values; says what to do.
        """
        questions = self.questions(split)
        label = f"{self.name} {split}"
        return weighed(make_all(questions, lambda question: question.example(), self.on_empty, label), label)

    def questions(self, split: Split) -> list[SourcedQuestion]:
        """The questions of a split, before they are put into words; otherwise as `load`."""
        rows = self._rows(split)
        if not rows:
            return []
        record = self.record
        # A file may hold the task as instructions instead.
        columns = set(rows[0][1])
        if "instruction" in columns and not set(record.columns) <= columns:
            record = as_instructions(record)
        check_columns(rows, record.columns)

        def ask(row: tuple[str, Row]) -> SourcedQuestion:
            source, values = row
            with located(source):
                weight = as_weight(values.get("weight"), "weight")
            return SourcedQuestion(record, record.ask(values, source), source, weight)

        return make_all(rows, ask, self.on_empty, f"{self.name} {split}")

    def _rows(self, split: Split) -> Rows:
        """The rows of a split: a whole file if one is given for it, else its part of the data set."""
        files = {"train": self.train, "validation": self.validation, "test": self.test}
        path = files["validation"] if split == "test" and self.test is None else files[split]
        if path is not None:
            return read_file(path)
        if self.data is None and any(file is not None for file in files.values()):
            return []
        record, part = self.record, self.record.splits[split]
        if self.data is None:
            rows = read_split(record.source, part.split, subset=record.subset, revision=record.revision)
        else:
            self._check_splits(self.data)
            rows = read_split(self.data, part.split)
        return [rows[i] for i in part.indices(len(rows))]

    def _check_splits(self, data: str) -> None:
        """Raise ValueError for a single file in the place of several splits."""
        splits = sorted({part.split for part in self.record.splits.values()})
        if len(splits) > 1 and Path(data).is_file():
            raise ValueError(
                f"task.data: {data} is one file, but {self.name} has the splits {', '.join(splits)}; "
                "write {split} in place of the split's name in the path, or give whole files with --task.train and "
                "--task.test"
            )


def check_on_empty(on_empty: str) -> None:
    """Raise ValueError for an unknown value of `on_empty`."""
    if on_empty not in get_args(OnEmpty):
        raise ValueError(f"on_empty: got {on_empty!r}, allowed are {' and '.join(get_args(OnEmpty))}")


def make_all(items: Sequence[Item], make: Callable[[Item], Made], on_empty: OnEmpty, label: str) -> list[Made]:
    """Apply `make` to each item; items that raise `EmptyText` are an error, or are dropped and counted.

    Args:
        items: rows or questions.
        make: makes an example or a question of one.
        on_empty: "error" or "drop".
        label: names the items in messages, e.g. "gsm8k test".

    Raises:
        ValueError: an empty text, or nothing but empty texts.
    """
    made, dropped = [], 0
    for item in items:
        try:
            made.append(make(item))
        except EmptyText as error:
            if on_empty == "error":
                raise EmptyText(f"{error}; --task.on-empty drop leaves such rows out and counts them") from None
            dropped += 1
    if dropped:
        say(f"{label}: dropped {dropped:,} of {len(items):,} rows with an empty or missing text")
    if items and not made:
        raise ValueError(f"{label}: every row has an empty or missing text")
    return made


def weighed(examples: list[Example], label: str) -> list[Example]:
    """The examples, unless the loss has nothing to learn from them.

    Raises:
        ValueError: every one has the weight 0; names the first one's source and the label.
    """
    if examples and not any(example.weight for example in examples):
        raise ValueError(
            f"{examples[0].source}: this example has weight 0 in the loss, and so have all of {label}; there is "
            "nothing to train on"
        )
    return examples


def user_template(prompt: str) -> str:
    """A prompt template with its only placeholder renamed to {prompt}; "{prompt}" alone if it has several."""
    names = placeholders(prompt)
    return prompt.replace(f"{{{names[0]}}}", "{prompt}") if len(names) == 1 else "{prompt}"
