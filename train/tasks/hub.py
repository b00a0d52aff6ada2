"""A task by its name, read from the Hugging Face hub or from local files of the same columns."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple, TypeVar, get_args

from train.data import Example
from train.display.console import get_console
from train.tasks.instructions import as_instructions
from train.tasks.record import EmptyText, Question, Record, Split, holes
from train.tasks.records import TASKS
from train.tasks.rows import Rows, check_columns, read_file, read_split
from train.tasks.scoring import Rule

OnEmpty = Literal["error", "drop"]
T = TypeVar("T")


class Asked(NamedTuple):
    """A question, the record that puts it into words, and where it came from."""

    record: Record
    question: Question
    source: str

    def example(self, prompt: str | None = None) -> Example:
        """The question in words; by another template than the record's if one is given."""
        return self.record.example(self.question, self.source, prompt)


@dataclass(frozen=True)
class HubTask:
    """A task of the list in docs/tasks.md, by its name."""

    name: str
    """Its name in that list, e.g. gsm8k."""
    data: str | None = None
    """Where to read it instead of its place on the hub: a path with {split} in it (data/gsm8k_{split}.jsonl), a
    folder of train.jsonl, test.jsonl, ... (or .csv, .tsv, .parquet), or another hub id; {split} are the source's
    splits, and are cut as those of the hub are."""
    train: str | None = None
    """A local file of training examples; all of it."""
    validation: str | None = None
    """A local file of examples to watch while training; all of it."""
    test: str | None = None
    """A local file of held-out examples; all of it. None = the validation file, where a file is given for a split."""
    chat: bool = False
    """Ask through the model's chat template (always, for conversations)."""
    max_new_tokens: int = 0
    """Tokens that an answer may take; 0 = the task's own number."""
    on_empty: OnEmpty = "error"
    """What to do with a row whose answer is empty: stop, or leave it out and say how many."""

    def __post_init__(self) -> None:
        """Reject an unknown name; resolve what follows from it."""
        if self.name not in TASKS:
            raise ValueError(f"task: there is no {self.name!r}; known are {', '.join(TASKS)}")
        check_on_empty(self.on_empty)
        if self.max_new_tokens < 1:
            object.__setattr__(self, "max_new_tokens", self.record.max_new_tokens)
        if self.name == "chat":
            object.__setattr__(self, "chat", True)

    @property
    def record(self) -> Record:
        """All that is known of the task."""
        return TASKS[self.name]

    @property
    def rule(self) -> Rule:
        """How an answer is read."""
        return self.record.rule

    @property
    def template(self) -> str:
        """The prompt around what a person types, where that is one text; else the bare text."""
        return around(self.record.prompt)

    def load(self, split: Split) -> list[Example]:
        """The examples of a split; empty where files are given, but none for it.

        Raises:
            ValueError: no such file, the hub cannot be reached, missing columns, values that cannot be.
        """
        return keep(self.asked(split), lambda asked: asked.example(), self.on_empty, f"{self.name} {split}")

    def asked(self, split: Split) -> list[Asked]:
        """The questions of a split, before they are put into words; see `load`."""
        rows = self._rows(split)
        if not rows:
            return []
        record = self.record
        # The same task may have been written down as instructions.
        if "instruction" in rows[0][1] and not set(record.columns) <= set(rows[0][1]):
            record = as_instructions(record)
        check_columns(rows, record.columns)
        ask = lambda row: Asked(record, record.ask(row[1], row[0]), row[0])
        return keep(rows, ask, self.on_empty, f"{self.name} {split}")

    def _rows(self, split: Split) -> Rows:
        own = {"train": self.train, "validation": self.validation, "test": self.test or self.validation}[split]
        if own is not None:
            return read_file(own)
        if self.data is None and any((self.train, self.validation, self.test)):
            return []
        part, record = self.record.splits[split], self.record
        sources = {each.split for each in record.splits.values()}
        if self.data is not None and len(sources) > 1 and Path(self.data).is_file():
            raise ValueError(
                f"task.data: {self.data} is one file, but {self.name} has the splits {', '.join(sorted(sources))}; "
                "write {split} into the path in their place, or give whole files by --task.train and --task.test"
            )
        source, of_record = self.data or record.source, self.data is None
        rows = read_split(
            source,
            part.split,
            subset=record.subset if of_record else None,
            revision=record.revision if of_record else None,
        )
        return [rows[i] for i in part.chosen(len(rows))]


def check_on_empty(on_empty: str) -> None:
    """Raise ValueError for what on_empty cannot be."""
    if on_empty not in get_args(OnEmpty):
        raise ValueError(f"on_empty: got {on_empty!r}, allowed are {' and '.join(get_args(OnEmpty))}")


def keep(items: list[T], make: Callable[[T], object], on_empty: OnEmpty, what: str) -> list:
    """What is made of each item; those with an empty text are an error, or are left out and counted.

    Raises:
        ValueError: an empty text, or all of them.
    """
    made, empty = [], 0
    for item in items:
        try:
            made.append(make(item))
        except EmptyText:
            if on_empty == "error":
                raise
            empty += 1
    if empty:
        get_console(stderr=True).print(f"{what}: left out {empty} of {len(items)} rows with an empty text")
    if items and not made:
        raise ValueError(f"{what}: every row has an empty text")
    return made


def around(prompt: str) -> str:
    """A prompt's template with {prompt} in the place of its only hole; {prompt} alone where there are several."""
    names = holes(prompt)
    return prompt.replace(f"{{{names[0]}}}", "{prompt}") if len(names) == 1 else "{prompt}"
