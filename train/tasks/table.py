"""The user's own table: local files or any data set of the hub, with its columns named in the config."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from train.data import Example
from train.data.jsonl import chat_turns
from train.tasks.hub import OnEmpty, around, check_on_empty, keep
from train.tasks.record import EmptyText, Row, Split, fill, holes
from train.tasks.rows import Rows, check_columns, read_file, read_hub
from train.tasks.scoring import Rule, score


@dataclass(frozen=True)
class TableTask:
    """Your own data: .jsonl, .csv, .tsv, .parquet, or any hub data set; templates say what its columns are for."""

    train: str | None = "train"
    """Path of the training examples; with `data`, the name of a split there, e.g. train[:90%]."""
    validation: str | None = None
    """The same of examples to watch while training."""
    test: str | None = None
    """The same of held-out examples; None = the validation examples."""
    data: str | None = None
    """Id of a data set on the hub; None = the three above are local files."""
    subset: str | None = None
    """Configuration of the hub's data set."""
    prompt: str = "{prompt}"
    """The prompt, with {column} where a column's text goes."""
    completion: str = "{completion}"
    """What is trained on, likewise."""
    answer: str | None = None
    """The answer to score against, likewise; None = the completion."""
    choices: tuple[str, ...] = ()
    """Candidate completions, likewise; {column} alone may be a column of lists. Exactly one must be right."""
    messages: str | None = None
    """Column of conversations, lists of {"role", "content"}; instead of prompt and completion."""
    chat: bool = False
    """Ask through the model's chat template (always, for conversations)."""
    rule: Rule = "exact"
    """How an answer is read from the output, see `train.tasks.scoring`."""
    max_new_tokens: int = 64
    """Tokens that an answer may take."""
    on_empty: OnEmpty = "error"
    """What to do with a row whose prompt or completion is empty: stop, or leave it out and say how many."""

    def __post_init__(self) -> None:
        """Reject templates that name no column."""
        check_on_empty(self.on_empty)
        for name in ("prompt", "completion"):
            try:
                named = holes(getattr(self, name))
            except ValueError as error:
                raise ValueError(f"task.{name}: {getattr(self, name)!r}: {error}; write {{{{ for a brace") from None
            if self.messages is None and not all(named or [""]):
                raise ValueError(f"task.{name}: got {getattr(self, name)!r}, need a text with a {{column}}")
        if self.messages is not None:
            object.__setattr__(self, "chat", True)

    @property
    def template(self) -> str:
        """The prompt around what a person types, where that is one column; else the bare text."""
        return "{prompt}" if self.messages else around(self.prompt)

    def load(self, split: Split) -> list[Example]:
        """The examples of a split; empty where nothing was given for it.

        Raises:
            ValueError: no such file, the hub cannot be reached, missing columns, empty texts, no right choice.
        """
        rows = self._rows(
            {"train": self.train, "validation": self.validation, "test": self.test or self.validation}[split]
        )
        check_columns(rows, self._columns())
        return keep(rows, lambda row: self._example(*row), self.on_empty, f"{split} examples")

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
            for name in holes(template)
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
        names = holes(template)
        lists = [name for name in names if isinstance(row[name], list)]
        if not lists:
            return [fill(template, values)]
        if len(names) > 1:
            raise ValueError(
                f"task.choices: {template!r} names the lists {lists} beside other columns; only one may be"
            )
        return [fill(template, {names[0]: _text(each)}) for each in row[names[0]]]


def _text(value: Any) -> str:
    return "" if value is None else str(value)
