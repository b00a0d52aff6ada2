"""A task from a user's own table: local files or any hub data set, with templates that name its columns."""

from __future__ import annotations

from dataclasses import dataclass, replace

from train.data import Example, Split
from train.data.conversations import read_conversation
from train.data.fields import EmptyText, as_text, as_weight, is_missing, located
from train.data.loading import load
from train.data.records import Part, Recipe, Tally
from train.tasks.hub import user_template
from train.tasks.record import Row, fill, placeholders
from train.tasks.row_records import OnEmpty, RowRecords, check_on_empty
from train.tasks.rows import check_columns, read_file, read_hub
from train.tasks.scoring import Rule, check_gold, check_max_new_tokens, score


@dataclass(frozen=True)
class TableTask:
    """Your own table (.jsonl, .csv, .tsv, .parquet, or any hub data set), with templates that name its columns."""

    train: str | None = "train"
    """File of training examples, a folder of them, or a pattern such as shards/*.parquet; with data, a split of that
    data set, e.g. train[:90%]."""
    validation: str | None = None
    """Validation examples, in the same form; None = no evaluation during training."""
    test: str | None = None
    """Test examples, in the same form; None = the validation examples."""
    data: str | None = None
    """Id of a hub data set; None = train, validation and test are local files."""
    subset: str | None = None
    """Configuration of the hub data set."""
    prompt: str = "{prompt}"
    """Template of the prompt; {column} stands for the text of that column. Some of its columns may be empty in a row,
    but not all."""
    completion: str = "{completion}"
    """Template of the completion, which is trained on; none of its columns may be empty."""
    answer: str | None = None
    """Template of the gold answer for scoring; None = the completion."""
    choices: tuple[str, ...] = ()
    """Templates of the candidate completions, exactly one of them right; {column} alone may name a column of lists."""
    messages: str | None = None
    """Column of conversations, lists of {"role", "content"} or of ShareGPT's {"from", "value"}, used instead of prompt
    and completion."""
    weight: str | None = None
    """Column of the examples' weights in the loss, numbers; where it is empty, 1."""
    chat: bool = False
    """Use the model's chat template (always on for conversations)."""
    rule: Rule = "exact"
    """Rule that extracts the answer from an output, see docs/tasks.md."""
    max_new_tokens: int = 64
    """Maximum number of tokens in an answer."""
    on_empty: OnEmpty = "error"
    """What to do with rows that lack a text or their answer: stop with an error, or drop and count them."""

    def __post_init__(self) -> None:
        """Reject templates that name no column."""
        check_on_empty(self.on_empty)
        check_max_new_tokens(self.max_new_tokens)
        templates = [("prompt", self.prompt), ("completion", self.completion)]
        templates += [("answer", self.answer)] if self.answer is not None else []
        templates += [("choices", choice) for choice in self.choices]
        for name, template in templates:
            try:
                columns = placeholders(template)
            except ValueError as error:
                raise ValueError(f"task.{name}: {template!r}: {error}; write {{{{ for a brace") from None
            if self.messages is None and not all(columns if name == "choices" else columns or [""]):
                raise ValueError(f"task.{name}: got {template!r}, need a text with a {{column}}")
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
        return load(self.recipe(split))

    def recipe(self, split: Split) -> Recipe:
        """The examples of a split, read when they are needed."""
        test = self.validation if self.test is None else self.test
        name = {"train": self.train, "validation": self.validation, "test": test}[split]
        if name is None:
            return Recipe(())
        rows = read_file(name) if self.data is None else read_hub(self.data, name, subset=self.subset)
        columns = self._columns()

        def notes(tally: Tally, count: int) -> list[str]:
            first = rows.first()
            unused = [column for column in (first[1] if first else ()) if column not in columns]
            return [f"{name}: columns that are not used: {', '.join(map(repr, unused))}"] if unused else []

        def make(source: str, row: Row) -> Example:
            check_columns([(source, row)], columns)
            return self._checked(source, row, split)

        settings = repr((replace(self, train=None, validation=None, test=None), split))
        records = RowRecords(rows, make, f"{split} examples", self.on_empty, settings, notes=notes)
        return Recipe((Part(records),))

    def _columns(self) -> list[str]:
        weight = [] if self.weight is None else [self.weight]
        if self.messages is not None:
            return [self.messages, *weight]
        templates = (self.prompt, self.completion, *self._answer, *self.choices)
        return [*(name for template in templates for name in placeholders(template)), *weight]

    @property
    def _answer(self) -> tuple[str, ...]:
        """The template of the gold answer, if there is one."""
        return () if self.answer is None else (self.answer,)

    def _checked(self, source: str, row: Row, split: Split) -> Example:
        example = self._example(source, row)
        if split != "train":
            check_gold(example, self.rule)
        return example

    def _example(self, source: str, row: Row) -> Example:
        with located(source):
            weight = 1.0 if self.weight is None else as_weight(row[self.weight], self.weight)
            if self.messages is not None:
                turns, weights = read_conversation(row[self.messages], self.messages)
                return Example(turns, source, weight=weight, turn_weights=weights)
            prompt, completion = _prompt(self.prompt, row), _filled(self.completion, row)
            answer = None if self.answer is None else _filled(self.answer, row)
            choices = tuple(choice for template in self.choices for choice in _choices(template, row))
            example = replace(Example.of(prompt, completion, source, answer, choices), weight=weight)
            right = sum(score(choice, example.gold or "", self.rule) for choice in choices)
            if choices and right != 1:
                shown = ", ".join(map(repr, choices))
                raise ValueError(f"{right} of the choices are the answer {example.gold!r}, need one; they are {shown}")
            return example


def _prompt(template: str, row: Row) -> str:
    """The prompt; a column that is missing in the row is empty in it, unless all are."""
    names = placeholders(template)
    if all(is_missing(row[name]) for name in names):
        raise EmptyText(f"the prompt is empty: nothing in {', '.join(map(repr, dict.fromkeys(names)))}")
    return fill(template, {name: "" if is_missing(row[name]) else as_text(row[name], name) for name in names})


def _filled(template: str, row: Row) -> str:
    """A completion or an answer; each of its columns must be there."""
    return fill(template, {name: as_text(row[name], name) for name in placeholders(template)})


def _choices(template: str, row: Row) -> list[str]:
    """The candidates of one template: one, or one for each item of a column of lists."""
    names = placeholders(template)
    lists = [name for name in names if isinstance(row[name], list)]
    if not lists:
        return [_filled(template, row)]
    if len(names) > 1:
        raise ValueError(f"task.choices: {template!r} names the lists {lists} beside other columns; only one may be")
    return [fill(template, {names[0]: as_text(item, names[0])}) for item in row[names[0]]]
