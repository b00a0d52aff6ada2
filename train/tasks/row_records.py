"""Rows that become examples: one at a time, and those that lack a text are an error or are left out."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, TypeVar, get_args

from train.data import Example
from train.data.fields import EmptyText
from train.data.records import Read, Tally, code_digest
from train.display.console import say
from train.tasks.notes import say_once
from train.tasks.record import Row
from train.tasks.row_sources import Rows, RowSource

OnEmpty = Literal["error", "drop"]
Item = TypeVar("Item")
Made = TypeVar("Made")


@dataclass(frozen=True)
class RowRecords:
    """The examples of rows.

    rows      where they are read
    make      (source, row) -> example; raises ValueError
    label     names the rows in messages, e.g. "gsm8k test"
    on_empty  what happens to rows that lack a text
    settings  all that `make` depends on besides the row and the code
    count     what to count of the rows, for `notes`
    notes     (tally, number of rows) -> what a reader of the data should know
    missing   what to say if there are no rows
    wanted    which rows become examples; the others are not counted
    fault     what the rows that are dropped have
    """

    rows: RowSource
    make: Callable[[str, Row], Example]
    label: str
    on_empty: OnEmpty
    settings: str
    count: Callable[[Rows], Tally] = lambda rows: Tally()
    notes: Callable[[Tally, int], Sequence[str]] = lambda tally, rows: ()
    missing: str = ""
    wanted: Callable[[Row], bool] = lambda row: True
    fault: str = "an empty or missing text"

    @cached_property
    def key(self) -> str:
        """sha256 of the rows, the settings and the code."""
        parts = (self.rows.key, self.settings, self.on_empty, code_digest())
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()

    def __len__(self) -> int:
        """Number of rows."""
        return len(self.rows)

    def read(self, start: int, stop: int) -> Read:
        """The examples of some rows; counts them, those dropped, and those with a weight.

        Raises:
            ValueError: naming the row: it is not an example.
        """
        numbered = {number: row for number, row in enumerate(self.rows.read(start, stop), start) if self.wanted(row[1])}
        rows = list(numbered.values())
        made = {number: _made(row, lambda row: self.make(*row), self.on_empty) for number, row in numbered.items()}
        kept = {number: example for number, example in made.items() if example is not None}
        weighed = sum(example.weight != 0 for example in kept.values())
        counts = Counter(rows=len(rows), dropped=len(rows) - len(kept), weighed=weighed)
        return Read(list(kept.values()), list(kept), self.count(rows) + Tally(counts))

    def conclude(self, tally: Tally) -> None:
        """Say how many rows were dropped, and the notes.

        Raises:
            ValueError: no rows, only empty ones, or none with a weight.
        """
        rows, dropped, weighed = (tally.counts[name] for name in ("rows", "dropped", "weighed"))
        if not rows:
            raise ValueError(self.missing or f"{self.rows.name}: no rows")
        _check_dropped(dropped, rows, self.label, self.fault)
        for note in self.notes(tally, rows):
            say_once(note)
        if not weighed:
            first = self.rows.first()
            raise ValueError(
                f"{first[0] if first else self.label}: this example has weight 0 in the loss, and so have all of "
                f"{self.label}; there is nothing to train on"
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
    made = [each for each in (_made(item, make, on_empty) for item in items) if each is not None]
    _check_dropped(len(items) - len(made), len(items), label)
    return made


def _made(item: Item, make: Callable[[Item], Made], on_empty: OnEmpty) -> Made | None:
    """What `make` makes of an item; None for one that is dropped."""
    try:
        return make(item)
    except EmptyText as error:
        if on_empty == "error":
            raise EmptyText(f"{error}; --task.on-empty drop leaves such rows out and counts them") from None
        return None


def _check_dropped(dropped: int, rows: int, label: str, fault: str = "an empty or missing text") -> None:
    if dropped:
        say(f"{label}: dropped {dropped:,} of {rows:,} rows with {fault}")
    if rows and dropped == rows:
        raise ValueError(f"{label}: every row has {fault}")
