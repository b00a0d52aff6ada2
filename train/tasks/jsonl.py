"""A task from JSON Lines files of prompts with completions, or of conversations."""

from __future__ import annotations

from dataclasses import dataclass, field

from train.data import Example, Keys, Split, read_jsonl
from train.tasks.scoring import Rule


@dataclass(frozen=True)
class JsonlTask:
    """Your own data as JSON Lines: a prompt with its completion in each line, or a list of chat messages."""

    train: str
    """File of training examples."""
    validation: str | None = None
    """File of validation examples; None = no evaluation during training."""
    test: str | None = None
    """File of test examples; None = the validation examples."""
    keys: Keys = field(default_factory=Keys)
    """JSON keys of a line."""
    template: str = "{prompt}"
    """Text around a prompt; must contain {prompt}."""
    chat: bool = False
    """Use the model's chat template; required for conversations."""
    rule: Rule = "exact"
    """Rule that extracts the answer from an output, see docs/tasks.md."""
    max_new_tokens: int = 64
    """Maximum number of tokens in an answer."""

    def load(self, split: Split) -> list[Example]:
        """The examples of a split; empty if it has no file.

        Raises:
            ValueError: naming file and line: a line that is not an example.
        """
        path = {"train": self.train, "validation": self.validation, "test": self.test or self.validation}[split]
        return [] if path is None else read_jsonl(path, self.keys, template=self.template)
