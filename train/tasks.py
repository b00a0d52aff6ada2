"""Tasks: what is asked, what is right, and where the examples come from."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from train.data import Example, Keys, ListOps, read_jsonl
from train.data.listops import TEMPLATES, generate
from train.scoring import Rule

Split = Literal["train", "validation", "test"]


@dataclass(frozen=True)
class ListOpsTask:
    """Nested list operations with a digit as the answer, from the project's own generator."""

    problems: ListOps = field(default_factory=ListOps)
    """Difficulty, number and seed of the problems."""
    chat: bool = False
    """Ask through the model's chat template."""
    max_new_tokens: int = 5
    """Tokens that an answer may take."""

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
        return generate(self.problems, split)


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
    """How an answer is read from the output: exact, digit or tagged."""
    max_new_tokens: int = 64
    """Tokens that an answer may take."""

    def load(self, split: Split) -> list[Example]:
        """The examples of a split; empty where no file was given for it."""
        path = {"train": self.train, "validation": self.validation, "test": self.test or self.validation}[split]
        return [] if path is None else read_jsonl(path, self.keys, template=self.template)


Task = ListOpsTask | JsonlTask


def task_to_json(task: Task) -> dict[str, Any]:
    """A task as plain JSON values; `task_from_json` reads it back."""
    return {"type": type(task).__name__, **asdict(task)}


def task_from_json(data: dict[str, Any]) -> Task:
    """Read a task back.

    Raises:
        ValueError: a type or a setting that this version does not know.
    """
    settings = {key: value for key, value in data.items() if key != "type"}
    try:
        if data.get("type") == "ListOpsTask":
            problems = dict(settings.pop("problems"))
            problems["operations"] = tuple(problems["operations"])
            return ListOpsTask(ListOps(**problems), **settings)
        if data.get("type") == "JsonlTask":
            return JsonlTask(keys=Keys(**settings.pop("keys")), **settings)
    except (TypeError, KeyError) as error:
        raise ValueError(f"task {data}: cannot be read ({error})") from None
    raise ValueError(f"unknown task {data.get('type')!r}; known are ListOpsTask and JsonlTask")
