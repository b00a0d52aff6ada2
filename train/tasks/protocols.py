"""What a function may ask of a task, whatever its kind."""

from __future__ import annotations

from typing import Protocol

from train.data import Example, Split
from train.tasks.scoring import Rule


class AnswerFormat(Protocol):
    """How a model is prompted, and how its answers are read."""

    @property
    def chat(self) -> bool:
        """Whether prompts go through the model's chat template."""
        ...

    @property
    def rule(self) -> Rule:
        """Rule that extracts the answer from an output."""
        ...

    @property
    def max_new_tokens(self) -> int:
        """Maximum number of tokens in an answer."""
        ...


class AnyTask(AnswerFormat, Protocol):
    """Any task: examples for each split, and the answer format."""

    @property
    def template(self) -> str:
        """Text around a prompt that a user types; contains {prompt}."""
        ...

    def load(self, split: Split) -> list[Example]:
        """The examples of a split; empty if there are none."""
        ...
