"""The ListOps task, from the generator in `train.data.listops` or from a file."""

from __future__ import annotations

from dataclasses import dataclass, field

from train.data import Example, ListOps, Split
from train.data.listops import TEMPLATES, generate, read_tsv
from train.data.records import Listed, Part, Recipe
from train.tasks.scoring import Rule, check_max_new_tokens


@dataclass(frozen=True)
class ListOpsTask:
    """Nested list operations whose answer is a digit, from this project's generator."""

    problems: ListOps = field(default_factory=ListOps)
    """Difficulty, number, format and random seed of the problems."""
    chat: bool = False
    """Use the model's chat template."""
    max_new_tokens: int = 5
    """Maximum number of tokens in an answer."""
    data: str | None = None
    """File of answer<TAB>expression lines instead of the generator; the text of a problem determines its split."""

    def __post_init__(self) -> None:
        """Reject a limit that allows no answer."""
        check_max_new_tokens(self.max_new_tokens)

    @property
    def rule(self) -> Rule:
        """Rule that extracts the answer from an output."""
        return "tagged" if self.problems.style == "tagged" else "digit"

    @property
    def template(self) -> str:
        """Text around a problem that a user types."""
        own = self.problems.prompt
        prompt = TEMPLATES[self.problems.style][0] if own is None else own
        return prompt.replace("{expression}", "{prompt}")

    def recipe(self, split: Split) -> Recipe:
        """The examples of a split."""
        return Recipe((Part(Listed(self.load(split))),))

    def load(self, split: Split) -> list[Example]:
        """The examples of a split; the three splits have no problem in common.

        Raises:
            ValueError: naming file and line: a malformed line; settings that do not allow that many problems.
        """
        if self.data is None:
            return generate(self.problems, split)
        return read_tsv(self.data, self.problems, split)
