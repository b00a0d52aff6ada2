"""Examples from JSON Lines that hold prompts with completions, or conversations."""

from __future__ import annotations

from dataclasses import dataclass, field

from train.data import Example, Keys, read_jsonl
from train.tasks.record import Split
from train.tasks.scoring import Rule


@dataclass(frozen=True)
class JsonlTask:
    """Your own data: JSON Lines with a prompt and a completion in each line, or a list of chat messages."""

    train: str
    """Path of the training examples."""
    validation: str | None = None
    """Path of examples to watch while training; None = no evaluation on the way."""
    test: str | None = None
    """Path of held-out examples; None = the validation examples."""
    keys: Keys = field(default_factory=Keys)
    """Names of the fields in a line."""
    template: str = "{prompt}"
    """Text around a prompt; must contain {prompt}."""
    chat: bool = False
    """Render through the model's chat template (always, for lines with messages)."""
    rule: Rule = "exact"
    """How an answer is read from the output, see `train.tasks.scoring`."""
    max_new_tokens: int = 64
    """Tokens that an answer may take."""

    def load(self, split: Split) -> list[Example]:
        """The examples of a split; empty where no file was given for it."""
        path = {"train": self.train, "validation": self.validation, "test": self.test or self.validation}[split]
        return [] if path is None else read_jsonl(path, self.keys, template=self.template)
