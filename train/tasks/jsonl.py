"""A task from JSON Lines files of prompts with completions, conversations, instructions or plain texts."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass, field

from train.data import Example, Keys, Reading, Split
from train.data.fields import EmptyText, show
from train.data.jsonl import ALPACA_TEMPLATE, Row, make_example, no_lines, notes_of, shape_of, tally_of
from train.data.loading import load
from train.data.records import Part, Recipe
from train.tasks.row_records import OnEmpty, RowRecords, check_on_empty
from train.tasks.rows import read_jsonl_files
from train.tasks.scoring import Rule, check_gold, check_max_new_tokens


@dataclass(frozen=True)
class JsonlTask:
    """Your own data as JSON Lines: a prompt with its completion in each line, a conversation, an instruction or a text.

    The keys of a line say what it is; docs/tasks.md has the list.
    """

    train: str
    """File of training examples; or a folder of .jsonl files, or a pattern such as shards/*.jsonl."""
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
    on_empty: OnEmpty = "error"
    """What to do with lines that lack a text, or their answer in validation and test: stop with an error, or drop and
    count them."""

    def __post_init__(self) -> None:
        """Reject settings that no file could suit."""
        check_on_empty(self.on_empty)
        check_max_new_tokens(self.max_new_tokens)

    @property
    def reading(self) -> Reading:
        """How the lines are read."""
        return Reading(self.keys, self.template, self.chat)

    @property
    def typed_template(self) -> str:
        """Text around a prompt that a user types: the template, or Alpaca's where training uses that."""
        if self.chat or self.template != "{prompt}":
            return self.template
        with suppress(ValueError):  # no training file here: nothing to look at
            first = read_jsonl_files(self.train).first()
            if first is not None and shape_of(first[1], self.keys) == "Alpaca":
                return ALPACA_TEMPLATE
        return self.template

    def load(self, split: Split) -> list[Example]:
        """The examples of a split; empty if it has no file. Prints what its lines hold besides prompts, if anything.

        Raises:
            ValueError: naming file and line: a line that is not an example; for validation and test, one whose gold
                answer is missing or cannot be matched.
        """
        return load(self.recipe(split))

    def recipe(self, split: Split) -> Recipe:
        """The examples of a split, read when they are needed."""
        test = self.validation if self.test is None else self.test
        path = {"train": self.train, "validation": self.validation, "test": test}[split]
        if path is None:
            return Recipe(())
        rows = read_jsonl_files(path)
        key = self.keys.answer
        scored = split != "train"
        answered = scored and key != self.keys.completion and any(key in row for _, row in rows.all())
        records = RowRecords(
            rows,
            lambda source, row: self._example(source, row, scored, answered),
            path,
            self.on_empty,
            repr((self.reading, self.rule, scored, answered)),
            count=lambda some: tally_of(some, self.keys),
            notes=lambda tally, lines: [f"{path}: {note}" for note in notes_of(tally, self.reading, lines)],
            missing=no_lines(path, self.keys),
        )
        return Recipe((Part(records),))

    def _example(self, source: str, row: Row, scored: bool, answered: bool) -> Example:
        """The example of a line; if `answered`, it must have an answer of its own, as other lines do."""
        example = make_example(row, source, self.reading)
        if not self.chat and example.turns[0].role in ("system", "user"):
            raise ValueError(f"{source}: a conversation needs the model's chat template: give --task.chat")
        if answered and example.answer is None:
            key = self.keys.answer
            raise EmptyText(
                f"{source}: {key!r} is missing ({show(row[key]) if key in row else 'no such key'}), though it is a key "
                "of this file; without it in any line, the completion would be the gold answer"
            )
        if scored:
            check_gold(example, self.rule)
        return example
