"""A task made of several: training examples in given shares, evaluation on the examples of all parts."""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import chain, islice
from pathlib import Path

import numpy as np

from train.data import Example, Split
from train.data.loading import load
from train.data.records import Part, Recipe
from train.tasks.hub import HubTask
from train.tasks.jsonl import JsonlTask
from train.tasks.listops import ListOpsTask
from train.tasks.notes import say_once
from train.tasks.protocols import typed_template
from train.tasks.scoring import Rule
from train.tasks.table import TableTask

PlainTask = ListOpsTask | JsonlTask | HubTask | TableTask
"""The kinds of task that are not made of others."""


@dataclass(frozen=True)
class MixtureTask:
    """Several tasks at once, in given shares. All must agree on `chat` and on the rule that reads answers.

    One pass over the training examples (an epoch) holds `examples` of them, divided among the parts by `weights`. A
    part whose share is larger than itself is repeated, a whole pass after the other; of a part whose share is smaller,
    a random selection is used, the same in every epoch. Validation and test examples are those of all parts, each once,
    evenly mixed, so that a limit on their number keeps the proportions.
    """

    parts: tuple[PlainTask, ...]
    """The tasks."""
    weights: tuple[float, ...] = ()
    """Share of each part in the training examples, relative to the sum; () = as large as the parts are."""
    names: tuple[str, ...] = ()
    """Name of each part, which its examples' sources begin with; () = those of the named tasks or of the files."""
    examples: int | None = None
    """Training examples in one pass; None = as many as all parts have together."""
    seed: int = 0
    """Random seed for the selection from each part."""

    def __post_init__(self) -> None:
        """Reject parts that cannot be mixed, and shares that are none."""
        if not self.parts:
            raise ValueError("task.parts: a mixture needs at least one task")
        for setting in ("weights", "names"):
            if getattr(self, setting) and len(getattr(self, setting)) != len(self.parts):
                raise ValueError(
                    f"task.{setting}: got {len(getattr(self, setting))} for {len(self.parts)} parts; give one for each"
                )
        if self.weights and not (all(0 <= weight < math.inf for weight in self.weights) and sum(self.weights) > 0):
            raise ValueError(f"task.weights: got {self.weights}, need shares of 0 or more, not all 0")
        if self.examples is not None and self.examples < 1:
            raise ValueError(f"task.examples must be at least 1, got {self.examples}")
        for setting in ("chat", "rule"):
            if len(values := {getattr(part, setting) for part in self.parts}) > 1:
                raise ValueError(
                    f"task.parts: a mixture's parts must have the same {setting}; got "
                    f"{', '.join(sorted(map(str, values)))}"
                )

    @property
    def chat(self) -> bool:
        """Use the model's chat template."""
        return self.parts[0].chat

    @property
    def rule(self) -> Rule:
        """Rule that extracts the answer from an output."""
        return self.parts[0].rule

    @property
    def max_new_tokens(self) -> int:
        """Maximum number of tokens in an answer: that of the part which allows most."""
        return max(part.max_new_tokens for part in self.parts)

    @property
    def template(self) -> str:
        """Text around a prompt that a user types, if the parts agree on it; else "{prompt}"."""
        templates = {typed_template(part) for part in self.parts}
        return templates.pop() if len(templates) == 1 else "{prompt}"

    def load(self, split: Split) -> list[Example]:
        """The examples of a split; a source begins with its part's name.

        Raises:
            ValueError: of a part; or a part with a share has no training examples.
        """
        return load(self.recipe(split))

    def recipe(self, split: Split) -> Recipe:
        """The examples of a split, read when they are needed."""
        inner = [part.recipe(split).parts for part in self.parts]
        parts = [
            [Part(records, f"{name}: ") for records, _ in each]
            for name, each in zip(self.part_names, inner, strict=True)
        ]
        return Recipe(tuple(chain(*parts)), lambda counts: self._choose(split, _summed(counts, map(len, inner))))

    def gather(self, split: Split, read: Callable[[PlainTask], list[Example]]) -> list[Example]:
        """The examples of a split, which `read` gives for each part, mixed.

        Args:
            split: in "train", parts have their shares.
            read: gives the examples of a part.
        """
        each = [
            [_renamed(example, name) for example in read(part)]
            for name, part in zip(self.part_names, self.parts, strict=True)
        ]
        everything = list(chain(*each))
        return [everything[number] for number in self._choose(split, list(map(len, each))).tolist()]

    def _choose(self, split: Split, sizes: Sequence[int]) -> np.ndarray:
        """The numbers of the examples used, among those of all parts one after another."""
        starts = np.append(0, np.cumsum(sizes))
        if split != "train":
            return interleaved([np.arange(start, start + size) for start, size in zip(starts, sizes, strict=False)])
        counts = self._counts(sizes)
        for name, size, count in zip(self.part_names, sizes, counts, strict=True):
            passes = f"{count / size:.2g} passes over its" if size else "of"
            say_once(f"mixture: {name} gives {count:,} of {sum(counts):,} training examples, {passes} {size:,}")
        drawn = [self._drawn(size, count, i) for i, (size, count) in enumerate(zip(sizes, counts, strict=True))]
        return interleaved([start + some for start, some in zip(starts, drawn, strict=False)])

    @property
    def part_names(self) -> tuple[str, ...]:
        """A name for each part; equal ones are numbered."""
        names = self.names or tuple(map(_name, self.parts))
        total, seen = Counter(names), Counter[str]()
        unique = []
        for name in names:
            seen[name] += 1
            unique.append(f"{name} {seen[name]}" if total[name] > 1 else name)
        return tuple(unique)

    def _counts(self, sizes: Sequence[int]) -> list[int]:
        """Training examples of each part in one pass: its share, rounded so that they add up."""
        total, weights = sum(sizes) if self.examples is None else self.examples, self.weights or sizes
        for name, size, weight in zip(self.part_names, sizes, weights, strict=True):
            if weight and not size:
                raise ValueError(f"task.parts: {name} has no training examples, but a share of them")
        if not sum(weights):
            return [0] * len(sizes)
        exact = [total * weight / sum(weights) for weight in weights]
        counts = [math.floor(share) for share in exact]
        by_rest = sorted(range(len(exact)), key=lambda i: (counts[i] - exact[i], i))
        for i in by_rest[: total - sum(counts)]:
            counts[i] += 1
        return counts

    def _drawn(self, size: int, count: int, part: int) -> np.ndarray:
        """`count` of the numbers below `size`: whole passes in random order, then a random selection."""
        passes: list[np.ndarray] = []
        for first in range(0, count, max(size, 1)):
            # Python guarantees the same sequence across versions for random() alone.
            draw = random.Random(f"mixture/{self.seed}/{part}/{first}").random
            keys = np.fromiter((draw() for _ in range(size)), np.float64, size)
            passes.append(np.argsort(keys, kind="stable")[: count - first])
        return np.concatenate([np.empty(0, np.int64), *passes])


def interleaved(lists: Sequence[np.ndarray]) -> np.ndarray:
    """All numbers of several lists, each list in its own order and spread evenly over the whole."""
    places = np.concatenate([(np.arange(len(items)) + 0.5) / max(len(items), 1) for items in lists])
    return np.concatenate(lists)[np.argsort(places, kind="stable")]


def _summed(counts: Sequence[int], lengths: Iterable[int]) -> list[int]:
    """Sums of the counts in successive groups of these lengths."""
    left = iter(counts)
    return [sum(islice(left, length)) for length in lengths]


def _renamed(example: Example, name: str) -> Example:
    return replace(example, source=f"{name}: {example.source}")


def _name(task: PlainTask) -> str:
    """A short name for a task: that of a named one, else of its file or data set."""
    if isinstance(task, HubTask):
        return task.name
    if isinstance(task, ListOpsTask):
        return "listops"
    source = task.data if isinstance(task, TableTask) and task.data is not None else task.train
    return Path(source or "part").stem
