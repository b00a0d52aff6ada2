"""The prompts and completions that both sides work on: of a file, or made up with the lengths of GSM8K's or BoolQ's."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from random import Random
from typing import NamedTuple

from jaxsteer.io.files import write_text
from train.data import Example
from train.data.fields import as_text, located
from train.data.text_files import json_lines

FIELDS = (("prompt", "completion"), ("question", "answer"), ("instruction", "output"))
"""Fields of a line that hold its prompt and completion."""

MADE_UP = 2_000
"""Number of examples that are made up where no file is given."""


class Text(NamedTuple):
    """A prompt and its completion."""

    prompt: str
    completion: str


class Data(NamedTuple):
    """Examples of one kind.

    texts   at least one
    origin  the file and the hash of its contents, or "made up"
    """

    texts: Sequence[Text]
    origin: str

    def examples(self) -> list[Example]:
        """For encoding; each has a newline between prompt and completion."""
        return [Example.of(f"{t.prompt}\n", t.completion, f"{self.origin}:{n}") for n, t in enumerate(self.texts, 1)]

    def write(self, path: Path) -> None:
        """Write JSON Lines with "prompt" and "completion"."""
        rows = (json.dumps({"prompt": f"{text.prompt}\n", "completion": text.completion}) for text in self.texts)
        write_text(path, "".join(f"{row}\n" for row in rows))


def read_texts(path: str) -> Data:
    """Read a JSONL file.

    Raises:
        ValueError: it cannot be read, has no lines, or a line has no prompt with a completion; FIELDS are allowed.
    """
    texts = []
    for source, row in json_lines(path):
        fields = next((fields for fields in FIELDS if all(row.get(name) is not None for name in fields)), None)
        if fields is None:
            known = ", ".join(" and ".join(names) for names in FIELDS)
            raise ValueError(f"{source}: no prompt with a completion; expected the fields {known}")
        with located(source):
            texts.append(Text(*(as_text(row[name], name) for name in fields)))
    if not texts:
        raise ValueError(f"{path}: no lines; expected prompts with completions")
    digest = hashlib.sha256(Path(path).read_bytes()).hexdigest()
    return Data(texts, f"{Path(path).name} ({digest[:12]})")


def problems() -> Data:
    """Word problems with worked answers, about as long as GSM8K's."""
    return _made_up(_problem)


def questions() -> Data:
    """Questions to be answered with true or false, about as long as BoolQ's."""
    return _made_up(_question)


KINDS: Mapping[str, Callable[[], Data]] = {"gsm8k": problems, "boolq": questions}
"""Kind of data -> what makes it up where no file is given."""


def _made_up(make: Callable[[Random], Text]) -> Data:
    draw = Random(0)
    return Data([make(draw) for _ in range(MADE_UP)], "made up")


NAMES = ("Ana", "Boris", "Chen", "Dalia", "Emil", "Farah", "Goran", "Hana", "Ivo", "Jana")
THINGS = ("pencils", "apples", "tickets", "marbles", "books", "eggs", "stamps", "bottles", "flowers", "shells")
PLACES = ("the market", "school", "the harbour", "her uncle's farm", "the library", "the fair next door")


def _problem(draw: Random) -> Text:
    """Several purchases of one person, added up; the number of them varies as the length of GSM8K's answers does."""
    name, thing = draw.choice(NAMES), draw.choice(THINGS)
    told, steps, total = [], [], 0
    for _ in range(min(9, max(1, round(draw.lognormvariate(0.75, 0.45))))):
        packs, each, gone = (draw.randrange(2, 60) for _ in range(3))
        told.append(f"At {draw.choice(PLACES)} {name} buys {packs} boxes of {each} {thing} and gives {gone} away.")
        got = packs * each - gone
        steps.append(f"{packs} boxes of {each} are {packs}*{each} = {packs * each} {thing}, and {got} are left.")
        steps.append(f"With the {total} of before, {name} has {total} + {got} = {total + got} {thing} now.")
        total += got
    asked = f"How many {thing} does {name} have in the end?"
    return Text(" ".join([*told, asked]), "\n".join([*steps, f"#### {total}"]))


def _question(draw: Random) -> Text:
    thing, place, count = draw.choice(THINGS), draw.choice(PLACES), draw.randrange(2, 999)
    asked = f"is it usual to find more than {count} {thing} at {place}"
    text = f"Please answer the following question with true or false, question: {asked}?\n\nAnswer format: true/false"
    return Text(text, f"the correct answer is {'true' if count < 200 else 'false'}")
