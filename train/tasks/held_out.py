"""Validation examples for a task that has none: a share of its training examples, taken out of them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from train.data import Example, Split
from train.tasks.protocols import AnyTask
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

    task: AnyTask
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
        if split == "test" and (own := self.task.load("test")):
            return own
        if split != "train" and self.task.load("validation"):
            raise ValueError(
                f"--validation-share {self.share}: the task has validation examples already; leave the option out, or "
                "leave out the task's"
            )
        examples = self.task.load("train")
        held = self._held(examples)
        if split != "train":
            return [examples[index] for index in held]
        out = set(held)
        return [example for index, example in enumerate(examples) if index not in out]

    def _held(self, examples: list[Example]) -> list[int]:
        """Indices of the examples held out."""
        alike: dict[object, list[int]] = {}
        for index, example in enumerate(examples):
            alike.setdefault(example.context.turns or example.turns, []).append(index)
        groups, wanted = list(alike.values()), max(1, round(self.share * len(examples)))
        held: list[int] = []
        for group in np.random.default_rng(SEED).permutation(len(groups)).tolist():
            if len(held) >= wanted:
                break
            held += groups[group]
        if not 0 < len(held) < len(examples):
            raise ValueError(
                f"--validation-share {self.share}: {len(examples)} training examples, {len(groups)} of them different, "
                "are too few to hold some out"
            )
        return held
