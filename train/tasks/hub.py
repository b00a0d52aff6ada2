"""A named task, read from the Hugging Face hub or from local files with the same columns."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from jaxsteer.plans import did_you_mean
from train.data import Example, Split
from train.data.fields import as_weight, located
from train.data.loading import load
from train.data.records import Part, Recipe
from train.tasks.instructions import as_instructions
from train.tasks.record import Question, Record, Row, placeholders
from train.tasks.records import TASKS
from train.tasks.row_records import OnEmpty, RowRecords, check_on_empty, make_all
from train.tasks.row_sources import PickedRows, RowSource
from train.tasks.rows import check_columns, read_file, read_split
from train.tasks.scoring import Rule


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
        return load(self.recipe(split))

    def recipe(self, split: Split) -> Recipe:
        """The examples of a split, read when they are needed."""
        rows = self._rows(split)
        return Recipe(()) if rows is None else Recipe((Part(self._records(rows, split)),))

    def _records(self, rows: RowSource, split: Split) -> RowRecords:
        ask = self._asker(rows)
        settings = repr((self.name, split))  # the record itself is code
        return RowRecords(rows, lambda *row: ask(row).example(), f"{self.name} {split}", self.on_empty, settings)

    def questions(self, split: Split) -> list[SourcedQuestion]:
        """The questions of a split, before they are put into words; otherwise as `load`."""
        rows = self._rows(split)
        return [] if rows is None else make_all(rows.all(), self._asker(rows), self.on_empty, f"{self.name} {split}")

    def _asker(self, rows: RowSource) -> Callable[[tuple[str, Row]], SourcedQuestion]:
        """Reads a row, of those given."""
        record = self.record
        # A file may hold the task as instructions instead.
        first = rows.first()
        columns = set(first[1]) if first else set()
        if "instruction" in columns and not set(record.columns) <= columns:
            record = as_instructions(record)

        def ask(row: tuple[str, Row]) -> SourcedQuestion:
            source, values = row
            check_columns([row], record.columns)
            with located(source):
                weight = as_weight(values.get("weight"), "weight")
            return SourcedQuestion(record, record.ask(values, source), source, weight)

        return ask

    def _rows(self, split: Split) -> RowSource | None:
        """The rows of a split: a whole file if one is given for it, else its part of the data set; None for no rows."""
        files = {"train": self.train, "validation": self.validation, "test": self.test}
        path = files["validation"] if split == "test" and self.test is None else files[split]
        if path is not None:
            return read_file(path)
        if self.data is None and any(file is not None for file in files.values()):
            return None
        record, part = self.record, self.record.splits[split]
        if self.data is None:
            rows = read_split(record.source, part.split, subset=record.subset, revision=record.revision)
        else:
            self._check_splits(self.data)
            rows = read_split(self.data, part.split)
        return PickedRows(rows, part) if part.cuts else rows

    def _check_splits(self, data: str) -> None:
        """Raise ValueError for a single file in the place of several splits."""
        splits = sorted({part.split for part in self.record.splits.values()})
        if len(splits) > 1 and Path(data).is_file():
            raise ValueError(
                f"task.data: {data} is one file, but {self.name} has the splits {', '.join(splits)}; "
                "write {split} in place of the split's name in the path, or give whole files with --task.train and "
                "--task.test"
            )


def user_template(prompt: str) -> str:
    """A prompt template with its only placeholder renamed to {prompt}; "{prompt}" alone if it has several."""
    names = placeholders(prompt)
    return prompt.replace(f"{{{names[0]}}}", "{prompt}") if len(names) == 1 else "{prompt}"
