"""ListOps from the project's own generator, or from a file."""

from __future__ import annotations

from dataclasses import dataclass, field

from train.data import Example, ListOps
from train.data.listops import TEMPLATES, generate, read_tsv
from train.tasks.record import Split
from train.tasks.scoring import Rule


@dataclass(frozen=True)
class ListOpsTask:
    """Nested list operations with a digit as the answer, from the project's own generator."""

    problems: ListOps = field(default_factory=ListOps)
    """Difficulty, number and seed of the problems."""
    chat: bool = False
    """Ask through the model's chat template."""
    max_new_tokens: int = 5
    """Tokens that an answer may take."""
    data: str | None = None
    """A file of answer<TAB>expression lines instead of the generator; a problem's text alone decides its split."""

    @property
    def rule(self) -> Rule:
        """How an answer is read."""
        return "tagged" if self.problems.style == "tagged" else "digit"

    @property
    def template(self) -> str:
        """The prompt around a problem that a person types."""
        prompt = self.problems.prompt or TEMPLATES[self.problems.style][0]
        return prompt.replace("{expression}", "{prompt}")

    def load(self, split: Split) -> list[Example]:
        """The examples of a split; the three have no problem in common."""
        return read_tsv(self.data, self.problems, split) if self.data else generate(self.problems, split)
