"""Validation examples for a task that has none: a share of its training examples, taken out of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from train.data import Example, Split
from train.data.loading import load, scan
from train.data.records import Recipe
from train.tasks.protocols import PairTask, TrainingTask
from train.tasks.record import SEED
from train.tasks.scoring import Rule


@dataclass(frozen=True)
class HeldOutTask:
    """A task without validation examples that holds out a share of its training examples for them.

    Which ones depends on the examples and the share alone, not on the run's seed: runs with other seeds are compared on
    the same ones. Examples that ask the same stay together, so that no question is both trained on and held out. A task
    without test examples is tested on the examples held out.

    task   the task; its training examples are divided
    share  of the training examples, above 0 and below 1
    """

    task: TrainingTask
    share: float

    @property
    def chat(self) -> bool:
        """Whether prompts go through the model's chat template."""
        return self.task.chat

    @property
    def rule(self) -> Rule:
        """Rule that extracts the answer from an output."""
        return self.task.rule

    @property
    def max_new_tokens(self) -> int:
        """Maximum number of tokens in an answer."""
        return self.task.max_new_tokens

    @property
    def template(self) -> str:
        """Text around a prompt that a user types."""
        return self.task.template

    def load(self, split: Split) -> list[Example]:
        """The examples of a split; those held out are in random order, the others in the task's.

        Raises:
            ValueError: the task has validation examples of its own, or too few training examples to divide.
        """
        return load(self.recipe(split))

    def recipe(self, split: Split) -> Recipe:
        """The examples of a split, read when they are needed."""
        if split == "test" and (own := self.task.recipe("test")).parts:
            return own
        if split != "train" and self.task.recipe("validation").parts:
            raise ValueError(
                f"--validation-share {self.share}: the task has validation examples already; leave the option out, or "
                "leave out the task's"
            )
        return _divided(split, self.task.recipe("train"), lambda: _held(self, _keys(self.task.recipe("train"))))

    def rejected(self, split: Split) -> Recipe:
        """The answers that are not wanted; of a task of pairs, in the order of `recipe`. No prompt is divided."""
        assert isinstance(self.task, PairTask)
        if split == "test" and (own := self.task.rejected("test")).parts:
            return own
        whole = self.task.rejected("train")
        keys = _keys(self.task.recipe("train")) + _keys(whole)
        return _divided(split, whole, lambda: _held_unwanted(self, keys))


def _divided(split: Split, whole: Recipe, find: Callable[[], np.ndarray]) -> Recipe:
    """The training examples of a task that a split gets; `find` gives the numbers of those held out."""

    def choose(counts: Sequence[int]) -> np.ndarray:
        index, held = whole.index(counts), find()
        return index[held] if split != "train" else np.delete(index, held)

    return Recipe(whole.parts, choose)


def _keys(recipe: Recipe) -> tuple[str, ...]:
    return tuple(part.records.key for part in recipe.parts)


def _asked(recipe: Recipe) -> np.ndarray:
    """What each example of a recipe asks, uint64 [n]."""
    asked = [scan(part.records).asks for part in recipe.parts]
    return np.concatenate([np.empty(0, np.uint64), *asked])[recipe.index([len(some) for some in asked])]


@lru_cache(maxsize=4)
def _held(task: HeldOutTask, keys: tuple[str, ...]) -> np.ndarray:
    """Which of a task's training examples are held out; `keys` are those of its records."""
    hashes = _asked(task.task.recipe("train"))
    held, total = _drawn(hashes, task.share), len(hashes)
    if not 0 < len(held) < total:
        raise ValueError(
            f"--validation-share {task.share}: {total} training examples, {len(np.unique(hashes))} of them different, "
            "are too few to hold some out"
        )
    return held


@lru_cache(maxsize=4)
def _held_unwanted(task: HeldOutTask, keys: tuple[str, ...]) -> np.ndarray:
    """Which of the unwanted answers are held out: those to the prompts held out, and a share of those to others.

    Where the answers are pairs, these are the partners of the wanted ones held out.
    """
    assert isinstance(task.task, PairTask)
    wanted, unwanted = _asked(task.task.recipe("train")), _asked(task.task.rejected("train"))
    held = _held(task, keys[: len(task.task.recipe("train").parts)])
    if np.array_equal(wanted, unwanted):
        return held
    own = np.flatnonzero(~np.isin(unwanted, wanted))
    return np.union1d(np.flatnonzero(np.isin(unwanted, wanted[held])), own[_drawn(unwanted[own], task.share)])


def _drawn(hashes: np.ndarray, share: float) -> np.ndarray:
    """The numbers of a share of the examples that ask this, int [m]; those that ask the same stay together."""
    total, wanted = len(hashes), max(1, round(share * len(hashes)))
    _, first, group = np.unique(hashes, return_index=True, return_inverse=True)
    group = np.argsort(np.argsort(first))[group]  # numbered in the order in which they appear
    members = np.split(np.argsort(group, kind="stable"), np.cumsum(np.bincount(group))[:-1]) if total else []
    held: list[int] = []
    for number in np.random.default_rng(SEED).permutation(len(members)).tolist():
        if len(held) >= wanted:
            break
        held += members[number].tolist()
    return np.array(held, np.int64)
