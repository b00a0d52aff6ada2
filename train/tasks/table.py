"""A task from a user's own table: local files or any hub data set, with templates that name its columns."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from train.data import Example, Split
from train.data.jsonl import chat_turns
from train.tasks.hub import OnEmpty, check_on_empty, make_all, user_template
from train.tasks.record import EmptyText, Row, fill, placeholders
from train.tasks.rows import Rows, check_columns, read_file, read_hub
from train.tasks.scoring import Rule, score


@dataclass(frozen=True)
class TableTask:
    """Your own table (.jsonl, .csv, .tsv, .parquet, or any hub data set), with templates that name its columns."""

    train: str | None = "train"
    """File of training examples; with data, a split of that data set, e.g. train[:90%]."""
    validation: str | None = None
    """Validation examples, in the same form; None = no evaluation during training."""
    test: str | None = None
    """Test examples, in the same form; None = the validation examples."""
    data: str | None = None
    """Id of a hub data set; None = train, validation and test are local files."""
    subset: str | None = None
    """Configuration of the hub data set."""
    prompt: str = "{prompt}"
    """Template of the prompt; {column} stands for the text of that column."""
    completion: str = "{completion}"
    """Template of the completion, which is trained on."""
    answer: str | None = None
    """Template of the gold answer for scoring; None = the completion."""
    choices: tuple[str, ...] = ()
    """Templates of the candidate completions, exactly one of them right; {column} alone may name a column of lists."""
    messages: str | None = None
    """Column of conversations, lists of {"role", "content"}, used instead of prompt and completion."""
    chat: bool = False
    """Use the model's chat template (always on for conversations)."""
    rule: Rule = "exact"
    """Rule that extracts the answer from an output, see docs/tasks.md."""
    max_new_tokens: int = 64
    """Maximum number of tokens in an answer."""
    on_empty: OnEmpty = "error"
    """What to do with rows whose prompt or completion is empty: stop with an error, or drop and count them."""

    def __post_init__(self) -> None:
        """Reject templates that name no column."""
        check_on_empty(self.on_empty)
        for name in ("prompt", "completion"):
            try:
                columns = placeholders(getattr(self, name))
            except ValueError as error:
                raise ValueError(f"task.{name}: {getattr(self, name)!r}: {error}; write {{{{ for a brace") from None
            if self.messages is None and not all(columns or [""]):
                raise ValueError(f"task.{name}: got {getattr(self, name)!r}, need a text with a {{column}}")
        if self.messages is not None:
            object.__setattr__(self, "chat", True)

    @property
    def template(self) -> str:
        """Text around a prompt that a user types, if the prompt has a single column; else "{prompt}"."""
        return "{prompt}" if self.messages else user_template(self.prompt)

    def load(self, split: Split) -> list[Example]:
        """The examples of a split; empty if nothing is given for it.

        Raises:
            ValueError: a missing file, an unreachable hub, missing columns, empty texts, or no single right choice.
        """
        names = {"train": self.train, "validation": self.validation, "test": self.test or self.validation}
        rows = self._rows(names[split])
        check_columns(rows, self._columns())
        return make_all(rows, lambda row: self._example(*row), self.on_empty, f"{split} examples")

    def _rows(self, name: str | None) -> Rows:
        if name is None:
            return []
        return read_file(name) if self.data is None else read_hub(self.data, name, subset=self.subset)

    def _columns(self) -> list[str]:
        if self.messages is not None:
            return [self.messages]
        return [
            name
            for template in (self.prompt, self.completion, self.answer or "", *self.choices)
            for name in placeholders(template)
        ]

    def _example(self, source: str, row: Row) -> Example:
        if self.messages is not None:
            return Example(chat_turns(row[self.messages], self.messages, source), source)
        values = {name: _text(row[name]) for name in self._columns() if not isinstance(row[name], list)}
        prompt, completion = fill(self.prompt, values), fill(self.completion, values)
        for name, text in (("prompt", prompt), ("completion", completion)):
            if not text.strip():
                raise EmptyText(f"{source}: the {name} is empty")
        choices = tuple(choice for template in self.choices for choice in self._choices(template, row, values))
        example = Example.of(prompt, completion, source, fill(self.answer, values) if self.answer else None, choices)
        right = sum(score(choice, example.gold or "", self.rule) for choice in choices)
        if choices and right != 1:
            shown = ", ".join(map(repr, choices))
            raise ValueError(
                f"{source}: {right} of the choices are the answer {example.gold!r}, need one; they are {shown}"
            )
        return example

    def _choices(self, template: str, row: Row, values: dict[str, str]) -> list[str]:
        """The candidates of one template: one, or one for each item of a column of lists."""
        names = placeholders(template)
        lists = [name for name in names if isinstance(row[name], list)]
        if not lists:
            return [fill(template, values)]
        if len(names) > 1:
            raise ValueError(
                f"task.choices: {template!r} names the lists {lists} beside other columns; only one may be"
            )
        return [fill(template, {names[0]: _text(item)}) for item in row[names[0]]]


def _text(value: Any) -> str:
    """A cell as text; a missing value is empty."""
    return "" if value is None else str(value)
