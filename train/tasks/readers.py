"""Readers: what a row of each data set asks, as pure functions of the row. Invalid values raise ValueError."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

from train.data.conversations import read_conversation
from train.data.fields import EmptyText, as_text, is_missing, show, valid
from train.data.listops import evaluate
from train.tasks.extract import number as read_number
from train.tasks.record import Option, Question, Row

LETTERS = "ABCDEFGH"
"""Labels of choices that have none."""


def _text(row: Row, name: str, *, empty: bool = False) -> str:
    """The text in a column, stripped of surrounding white space."""
    value = row[name]
    if not isinstance(value, str) and not is_missing(value):
        raise ValueError(f"{name!r} must be a text, got {show(value)}")
    if empty and is_missing(value):
        return ""
    return valid(as_text(value, name), name).strip()


def _texts(row: Row, *names: str) -> dict[str, str]:
    """The texts of several columns, by their names in lower case."""
    return {name.lower(): _text(row, name) for name in names}


def _chosen(value: Any, options: Sequence[Option], allowed: Sequence[Any]) -> str:
    """The label of the option that a value stands for: options and allowed values correspond by position."""
    refused = f"the label is {show(value)}, allowed are {', '.join(map(repr, allowed))}"
    if is_missing(value):
        raise EmptyText(refused)
    given = as_text(value, "label").strip().casefold()
    for option, candidate in zip(options, allowed, strict=True):
        if given == str(candidate).casefold():
            return option.label
    raise ValueError(refused)


def _lettered(fields: dict[str, str], texts: Sequence[Any], value: Any, allowed: Sequence[Any]) -> Question:
    """A question with texts to choose from, labelled A, B, ...; `value` is the row's label, one of `allowed`."""
    if len(texts) > len(LETTERS):
        raise ValueError(f"has {len(texts)} choices; at most {len(LETTERS)} are read")
    options = _options(LETTERS[: len(texts)], texts)
    return Question(fields, _chosen(value, options, allowed), options)


def _options(labels: Sequence[str], texts: Sequence[Any]) -> tuple[Option, ...]:
    """Labelled candidates."""
    if any(map(is_missing, texts)):
        raise EmptyText(f"the choices must be texts that are not empty, got {show(list(texts))}")
    if not all(isinstance(text, str) for text in texts) or len(labels) != len(texts):
        raise ValueError(f"the choices must be {len(labels)} texts, got {show(list(texts))}")
    return tuple(Option(label, valid(text, "choices").strip()) for label, text in zip(labels, texts, strict=True))


def boolq(row: Row) -> Question:
    """BoolQ: a question about a passage, true or false."""
    options = (Option("True"), Option("False"))
    return Question(_texts(row, "passage", "question"), _chosen(row["answer"], options, (True, False)), options)


def winogrande(row: Row) -> Question:
    """WinoGrande: a sentence with a blank and two candidates for it."""
    options = (Option("Option1", _text(row, "option1")), Option("Option2", _text(row, "option2")))
    return Question(_texts(row, "sentence"), _chosen(row["answer"], options, ("1", "2")), options)


def mnli(row: Row) -> Question:
    """MNLI: whether a premise entails a hypothesis; label 0, 1 or 2."""
    options = (Option("ENTAILMENT"), Option("NEUTRAL"), Option("CONTRADICTION"))
    return Question(_texts(row, "premise", "hypothesis"), _chosen(row["label"], options, (0, 1, 2)), options)


def labelled(question: str) -> Callable[[Row], Question]:
    """ARC and OpenBookQA: a reader of rows with labelled choices, {"choices": {"text": [...], "label": [...]}}.

    Args:
        question: the column of the question.
    """

    def read(row: Row) -> Question:
        texts, labels = row["choices"]["text"], [as_text(label, "label") for label in row["choices"]["label"]]
        options = _options(labels, texts)
        return Question({"question": _text(row, question)}, _chosen(row["answerKey"], options, labels), options)

    return read


def hellaswag(row: Row) -> Question:
    """HellaSwag: a text with four candidate endings."""
    fields = {"activity": _text(row, "activity_label"), "context": _text(row, "ctx")}
    return _lettered(fields, row["endings"], row["label"], range(len(row["endings"])))


def piqa(row: Row) -> Question:
    """PIQA: a goal and two ways to reach it."""
    return _lettered(_texts(row, "goal"), (row["sol1"], row["sol2"]), row["label"], (0, 1))


def siqa(row: Row) -> Question:
    """SIQA: a question about a situation, with three candidate answers."""
    texts = (row["answerA"], row["answerB"], row["answerC"])
    return _lettered(_texts(row, "context", "question"), texts, row["label"], (1, 2, 3))


def aqua(row: Row) -> Question:
    """AQuA: a problem with options such as "A)21", and its solution."""
    pairs = [as_text(option, "options").partition(")") for option in row["options"]]
    options = tuple(Option(label.strip(" ("), text.strip()) for label, _, text in pairs)
    fields = _texts(row, "question", "rationale")
    return Question(fields, _chosen(row["correct"], options, [option.label for option in options]), options)


def _number(value: Any, name: str) -> str:
    """A number without trailing zeros: 8.0 becomes 8."""
    text = as_text(value, name).strip()
    if read_number(text) is None:
        raise ValueError(f"{name!r} must be a number, got {show(value)}")
    return re.sub(r"(\.\d*?)0+$", r"\1", text).rstrip(".") if "." in text else text


def reasoned(row: Row) -> Question:
    """GSM8K and MAWPS: reasoning, then "#### number"."""
    reasoning, mark, number = _text(row, "answer").rpartition("####")
    if is_missing(number) or read_number(number) is None:
        raise EmptyText("'answer' has no number after ####")
    number = _number(number, "answer")
    # A row may have the number alone.
    reasoning = reasoning.strip() + "\n" if mark and reasoning.strip() else ""
    return Question({"question": _text(row, "question"), "reasoning": reasoning, "number": number}, number)


def svamp(row: Row) -> Question:
    """SVAMP: a problem with the equation that solves it."""
    number = _number(row["Answer"], "Answer")
    fields = {**_texts(row, "Body", "Question"), "reasoning": _text(row, "Equation") + "\n", "number": number}
    return Question(fields, number)


_CALCULATION = re.compile(r'<gadget id="calculator">(.*?)</gadget>\s*<output>(.*?)</output>', re.DOTALL)


def asdiv(row: Row) -> Question:
    """ASDiv: a problem with calculator steps as marked-up text."""
    steps = "".join(
        f"{expression.strip()} = {value.strip()}\n" for expression, value in _CALCULATION.findall(row["chain"])
    )
    number = _number(row["result_float"], "result_float")
    return Question({"question": _text(row, "question"), "reasoning": steps, "number": number}, number)


def listops(row: Row) -> Question:
    """ListOps of Long Range Arena: an expression, checked against its answer."""
    # Some copies of the data write X for a closing bracket, and add the brackets of a binary tree.
    words = _text(row, "Source").replace("(", " ").replace(")", " ").split()
    expression, answer = " ".join("]" if word == "X" else word for word in words), as_text(row["Target"], "Target")
    value = evaluate(expression)
    if str(value) != answer:
        raise ValueError(f"the answer given is {answer}, but {expression} is {value}")
    return Question({"expression": expression}, answer)


def alpaca(row: Row) -> Question:
    """Alpaca: an instruction, with or without an input."""
    given = _text(row, "input", empty=True) if "input" in row else ""
    given = f"### Input:\n{given}\n\n" if given else ""
    output = _text(row, "output", empty=True)
    return Question({"instruction": _text(row, "instruction"), "given": given, "output": output}, output)


def conversation(row: Row) -> Question:
    """A conversation: a list of messages."""
    turns, weights = read_conversation(row["messages"], "messages")
    return Question({}, "", turns=turns, turn_weights=weights)
