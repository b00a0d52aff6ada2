"""Prompts to answer, from a command line, a text or a JSONL file, as examples without a completion."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal

from train.data.examples import Example, Turn
from train.data.jsonl import read_jsonl
from train.data.text_files import json_lines, read_text

Division = Literal["lines", "paragraphs", "whole"]
"""How a text is divided into prompts: one per line, at blank lines, or not at all."""


@dataclass(frozen=True)
class Question:
    """A prompt to answer.

    text          as it was given, without a template; None for a conversation
    example       what the model is asked
    row           the line of a JSONL file that it comes from; None for other sources
    conversation  whether it was given as messages
    """

    text: str | None
    example: Example
    row: dict[str, Any] | None = None
    conversation: bool = False


@dataclass(frozen=True)
class Asking:
    """How prompts are put to the model.

    template  text around a plain prompt
    system    the system message of a conversation that has none of its own
    """

    template: str = "{prompt}"
    system: str | None = None

    def question(self, text: str, source: str) -> Question:
        """A plain prompt.

        Raises:
            ValueError: it is empty, or not valid Unicode.
        """
        if not text:
            raise ValueError(f"{source}: the prompt is empty; give some text, or leave it out")
        check_unicode(text, source)
        return Question(text, self._with_system(Example.of(self.template.replace("{prompt}", text), None, source)))

    def _with_system(self, example: Example) -> Example:
        turns = example.turns
        if self.system is None or turns[0].role == "system":
            return example
        if turns[0].role == "prompt":
            turns = (Turn("user", turns[0].text), *turns[1:])
        return Example((Turn("system", self.system), *turns), example.source, example.answer)

    def rows(self, path: str | Path) -> list[Question]:
        """The lines of a JSONL file, in the forms that training reads; completions and final answers are left out.

        Raises:
            ValueError: naming file and line: not such a line.
        """
        rows = [row for _, row in json_lines(path)]
        examples = read_jsonl(path, template=self.template, completions=False)
        questions = []
        for row, example in zip(rows, examples, strict=True):
            check_unicode(json.dumps(row, ensure_ascii=False), example.source)
            plain = example.turns[0].role == "prompt"
            text = str(row["prompt"]) if plain and "prompt" in row else None
            questions.append(Question(text, self._with_system(example.context), row, not plain))
        return questions

    def texts(self, text: str, source: str, division: Division) -> list[Question]:
        """The prompts of a text; `source` names it, and each prompt's source has the number of its first line."""
        return [self.question(part, f"{source}:{line}") for line, part in divide(text, division)]


def divide(text: str, division: Division) -> list[tuple[int, str]]:
    """(number of the first line, prompt) of each prompt in a text; line breaks around a prompt are not part of it."""
    text = text.replace("\r\n", "\n")
    if division == "whole":
        return [(1, text.removesuffix("\n"))] if text.strip() else []
    if division == "lines":
        return [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    blocks = re.finditer(r"[^\n]*\S[^\n]*(?:\n[^\n]*\S[^\n]*)*", text)
    return [(text.count("\n", 0, block.start()) + 1, block.group()) for block in blocks]


def read_questions(path: str | Path, asking: Asking, division: Division) -> list[Question]:
    """The prompts of a file: JSONL if its name ends so, else text.

    Raises:
        ValueError: no such file, not UTF-8, no prompts, or a line that is no prompt; the message names file and line.
    """
    if Path(path).is_dir():
        raise ValueError(f"{path}: a folder; give a file, .jsonl or text with prompts")
    if not Path(path).is_file():
        raise ValueError(f"{path}: no such file (expected .jsonl, or text with prompts)")
    if Path(path).suffix == ".jsonl":
        return asking.rows(path)
    questions = asking.texts(read_text(path), str(path), division)
    if not questions:
        raise ValueError(f"{path}: no prompts, the file is empty")
    return questions


def read_standard_input(stream: BinaryIO | None, asking: Asking, division: Division) -> list[Question]:
    """The prompts on standard input.

    Raises:
        ValueError: it is closed, empty or not UTF-8.
    """
    nothing = "no prompts: give some, a file with --input, or text on standard input"
    if stream is None:
        raise ValueError(f"{nothing} (which is closed)")
    try:
        text = stream.read().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"standard input: not UTF-8 text ({error.reason} at byte {error.start})") from None
    except OSError:
        raise ValueError(f"{nothing} (which is closed)") from None
    questions = asking.texts(text, "standard input", division)
    if not questions:
        raise ValueError(nothing)
    return questions


def check_unicode(text: str, source: str) -> None:
    """Refuse a text with lone surrogates, which bytes that are not UTF-8 on a command line become.

    Raises:
        ValueError: naming the source and the place.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{source}: not valid Unicode text: character {error.start} is half of a surrogate pair, or a byte that is "
            "not UTF-8"
        ) from None


def ask_all(prompts: Sequence[str], asking: Asking) -> list[Question]:
    """Prompts as typed."""
    return [asking.question(text, f"prompt {number}") for number, text in enumerate(prompts, 1)]
