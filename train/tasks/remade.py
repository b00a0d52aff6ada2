"""Records whose examples are made into others."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass

from train.data import Example
from train.data.records import Read, Records, Tally, code_digest


@dataclass(frozen=True)
class Remade:
    """Records whose examples are made into others, or left out.

    records  the others
    make     example -> example, or None to leave it out; raises ValueError
    name     says what `make` depends on
    """

    records: Records
    make: Callable[[Example], Example | None]
    name: str

    @property
    def key(self) -> str:
        """sha256 of the records' key, the name and the code."""
        return hashlib.sha256("\n".join((self.records.key, self.name, code_digest())).encode()).hexdigest()

    def __len__(self) -> int:
        """Number of rows."""
        return len(self.records)

    def read(self, start: int, stop: int) -> Read:
        """The examples of some rows, made into others."""
        read = self.records.read(start, stop)
        made = [(self.make(example), row) for example, row in zip(read.examples, read.rows, strict=True)]
        kept = [(example, row) for example, row in made if example is not None]
        return Read([example for example, _ in kept], [row for _, row in kept], read.tally)

    def conclude(self, tally: Tally) -> None:
        """As the records'."""
        self.records.conclude(tally)
