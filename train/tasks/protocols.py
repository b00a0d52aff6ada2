"""What a function may ask of a task, whatever its kind."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from train.data import Example, Split
from train.data.records import Recipe
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


class TrainingTask(AnyTask, Protocol):
    """A task that can be trained on: its examples need not fit memory."""

    def recipe(self, split: Split) -> Recipe:
        """The examples that `load` gives, read when they are needed."""
        ...


@runtime_checkable
class PairTask(TrainingTask, Protocol):
    """A task with answers that are not wanted, besides those that `recipe` gives."""

    def rejected(self, split: Split) -> Recipe:
        """The answers that are not wanted; where they come in pairs, in the order of `recipe`."""
        ...


def typed_template(task: AnyTask) -> str:
    """Text around a prompt that a user types, such that the model is asked as in training; contains {prompt}.

    It is the task's `template`, unless the task knows better from its data: then it has an attribute of this name.
    """
    template: str = getattr(task, "typed_template", task.template)
    return template
