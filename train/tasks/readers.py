"""Readers: what a row of each data set asks, as pure functions of the row. Invalid values raise ValueError."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

from train.data.jsonl import chat_turns
from train.data.listops import evaluate
from train.tasks.record import EmptyText, Option, Question, Row


def _text(row: Row, name: str, *, empty: bool = False) -> str:
    """The text in a column, stripped of surrounding white space."""
    value = row[name]
    if not isinstance(value, str):
        raise ValueError(f"{name!r} must be a text, got {value!r}")
    if not value.strip() and not empty:
        raise EmptyText(f"{name!r} is empty")
    return value.strip()


def _texts(row: Row, *names: str) -> dict[str, str]:
    """The texts of several columns, by their names in lower case."""
    return {name.lower(): _text(row, name) for name in names}


def _chosen(value: Any, options: Sequence[Option], allowed: Sequence[Any]) -> str:
    """The label of the option that a value stands for: options and allowed values correspond by position."""
    for option, candidate in zip(options, allowed, strict=True):
        if str(value).strip().casefold() == str(candidate).casefold():
            return option.label
    raise ValueError(f"the label is {value!r}, allowed are {', '.join(map(repr, allowed))}")


def _lettered(fields: dict[str, str], texts: Sequence[Any], value: Any, allowed: Sequence[Any]) -> Question:
    """A question with texts to choose from, labelled A, B, ...; `value` is the row's label, one of `allowed`."""
    if not all(isinstance(text, str) and text.strip() for text in texts):
        raise ValueError(f"the choices must be texts that are not empty, got {list(texts)!r}")
    options = tuple(Option(label, text.strip()) for label, text in zip("ABCDEFGH"[: len(texts)], texts, strict=True))
    return Question(fields, _chosen(value, options, allowed), options)


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
        texts, labels = row["choices"]["text"], row["choices"]["label"]
        options = tuple(Option(label, text.strip()) for label, text in zip(labels, texts, strict=True))
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
    pairs = [str(option).partition(")") for option in row["options"]]
    options = tuple(Option(label.strip(" ("), text.strip()) for label, _, text in pairs)
    fields = _texts(row, "question", "rationale")
    return Question(fields, _chosen(row["correct"], options, [option.label for option in options]), options)


def _number(value: Any) -> str:
    """A number without trailing zeros: 8.0 becomes 8."""
    text = str(value).strip()
    return re.sub(r"(\.\d*?)0+$", r"\1", text).rstrip(".") if "." in text else text


def reasoned(row: Row) -> Question:
    """GSM8K and MAWPS: reasoning, then "#### number"."""
    reasoning, mark, number = _text(row, "answer").rpartition("####")
    number = _number(number)
    if not number:
        raise ValueError("'answer' has no number after ####")
    # A row may have the number alone.
    reasoning = reasoning.strip() + "\n" if mark and reasoning.strip() else ""
    return Question({"question": _text(row, "question"), "reasoning": reasoning, "number": number}, number)


def svamp(row: Row) -> Question:
    """SVAMP: a problem with the equation that solves it."""
    number = _number(row["Answer"])
    fields = {**_texts(row, "Body", "Question"), "reasoning": _text(row, "Equation") + "\n", "number": number}
    return Question(fields, number)


_CALCULATION = re.compile(r'<gadget id="calculator">(.*?)</gadget>\s*<output>(.*?)</output>', re.DOTALL)


def asdiv(row: Row) -> Question:
    """ASDiv: a problem with calculator steps as marked-up text."""
    steps = "".join(
        f"{expression.strip()} = {value.strip()}\n" for expression, value in _CALCULATION.findall(row["chain"])
    )
    number = _number(row["result_float"])
    return Question({"question": _text(row, "question"), "reasoning": steps, "number": number}, number)


def listops(row: Row) -> Question:
    """ListOps of Long Range Arena: an expression, checked against its answer."""
    # Some copies of the data write X for a closing bracket, and add the brackets of a binary tree.
    words = _text(row, "Source").replace("(", " ").replace(")", " ").split()
    expression, answer = " ".join("]" if word == "X" else word for word in words), str(row["Target"])
    value = evaluate(expression)
    if str(value) != answer:
        raise ValueError(f"the answer given is {answer}, but {expression} is {value}")
    return Question({"expression": expression}, answer)


def alpaca(row: Row) -> Question:
    """Alpaca: an instruction, with or without an input."""
    given = "" if row.get("input") is None else _text(row, "input", empty=True)
    given = f"### Input:\n{given}\n\n" if given else ""
    output = _text(row, "output", empty=True)
    return Question({"instruction": _text(row, "instruction"), "given": given, "output": output}, output)


def conversation(row: Row) -> Question:
    """A conversation: a list of messages."""
    return Question({}, "", turns=chat_turns(row["messages"], "messages", "conversation"))
