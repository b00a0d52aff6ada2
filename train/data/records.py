"""Training data before it is tokenised: examples that are read when needed, so that they need not fit memory."""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from train.data.examples import Example

CHUNK = 2_000
"""Examples that are read and tokenised together: enough to keep the tokenizer's threads busy, few enough for a smooth
progress bar."""


@dataclass
class Tally:
    """Counts by name, and the range of a number, over some of the rows; of several parts, they are added."""

    counts: Counter[str] = field(default_factory=Counter)
    low: float = math.inf
    high: float = -math.inf

    def __add__(self, other: Tally) -> Tally:
        """The tally of both parts."""
        return Tally(self.counts + other.counts, min(self.low, other.low), max(self.high, other.high))

    def to_json(self) -> dict[str, Any]:
        """As JSON values; `Tally.of` reads them."""
        return {"counts": dict(self.counts), "range": [self.low, self.high]}

    @classmethod
    def of(cls, data: dict[str, Any]) -> Tally:
        """What `to_json` returned."""
        return cls(Counter(data["counts"]), *data["range"])


class Read(NamedTuple):
    """The examples of some rows, the row of each, and what is counted of the rows."""

    examples: list[Example]
    rows: Sequence[int]
    tally: Tally


class Records(Protocol):
    """Rows that become examples when they are read; a row may become none."""

    @property
    def key(self) -> str:
        """Differs wherever the examples may differ. Cheap beside reading the rows."""
        ...

    def __len__(self) -> int:
        """Number of rows."""
        ...

    def read(self, start: int, stop: int) -> Read:
        """The examples of the rows from `start` to before `stop`.

        Raises:
            ValueError: naming the row: it is not an example.
        """
        ...

    def conclude(self, tally: Tally) -> None:
        """Say what a reader of the data should know.

        Args:
            tally: of all rows.

        Raises:
            ValueError: no examples, or nothing to learn from them.
        """
        ...


@dataclass(frozen=True)
class Listed:
    """Examples that are in memory already."""

    examples: Sequence[Example]

    @cached_property
    def key(self) -> str:
        """sha256 of the examples."""
        digest = hashlib.sha256()
        for each in self.examples:
            digest.update(json.dumps([each.turns, each.source, each.gold, each.weight, each.turn_weights]).encode())
        return digest.hexdigest()

    def __len__(self) -> int:
        """Number of examples."""
        return len(self.examples)

    def read(self, start: int, stop: int) -> Read:
        """Some of the examples."""
        return Read(list(self.examples[start:stop]), range(start, stop), Tally())

    def conclude(self, tally: Tally) -> None:
        """Nothing is known of them but what they are."""


class Part(NamedTuple):
    """Records, and what the sources of their examples begin with."""

    records: Records
    prefix: str = ""


@dataclass(frozen=True)
class Recipe:
    """What a split of a task is made of.

    parts   where the examples come from
    choose  given the number of examples in each part, the numbers of those used among the examples of all parts, in
            order; None for all of them
    """

    parts: tuple[Part, ...]
    choose: Callable[[Sequence[int]], np.ndarray] | None = None

    def index(self, counts: Sequence[int]) -> np.ndarray:
        """The numbers of the examples used, int32 or int64 [n].

        Args:
            counts: number of examples in each part.
        """
        total = sum(counts)
        dtype = np.int32 if total < 2**31 else np.int64
        return np.arange(total, dtype=dtype) if self.choose is None else self.choose(counts).astype(dtype)


def sampled(recipe: Recipe, count: int) -> Recipe:
    """A random sample of a recipe's examples, in their order; a larger one contains every smaller one.

    Args:
        recipe: the examples.
        count: how many; 0 or more than there are: all.
    """

    def choose(counts: Sequence[int]) -> np.ndarray:
        index = recipe.index(counts)
        return index[np.sort(np.random.default_rng(0).permutation(len(index))[:count])]

    return Recipe(recipe.parts, choose) if count else recipe


@cache
def code_digest() -> str:
    """sha256 of the code that turns rows into tokens, and the versions of the libraries that it calls.

    It is part of what tokenised data is found by, so that an edited reader or template is not given stale tokens.
    """
    digest = hashlib.sha256()
    root = Path(__file__).parents[1]
    for path in sorted([*(root / "data").glob("*.py"), *(root / "tasks").glob("*.py")]):
        digest.update(f"{path.name} {path.stat().st_size}\n".encode() + path.read_bytes())
    for name in ("tokenizers", "transformers", "jinja2", "pyarrow", "datasets"):
        digest.update(f"{name} {version(name)}\n".encode())
    return digest.hexdigest()
