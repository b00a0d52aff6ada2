"""What a row of each data set asks: pure functions of a row. A value that cannot be raises ValueError."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

from train.data.jsonl import chat_turns
from train.data.listops import evaluate
from train.tasks.record import EmptyText, Option, Question, Row


def _text(row: Row, name: str, *, empty: bool = False) -> str:
    """The text in a column, without white space around it."""
    value = row[name]
    if not isinstance(value, str):
        raise ValueError(f"{name!r} must be a text, got {value!r}")
    if not value.strip() and not empty:
        raise EmptyText(f"{name!r} is empty")
    return value.strip()


def _texts(row: Row, *names: str) -> dict[str, str]:
    return {name.lower(): _text(row, name) for name in names}


def _chosen(value: Any, options: Sequence[Option], allowed: Sequence[Any]) -> str:
    """The label of the option that a row's value stands for: the value's place among those allowed."""
    for option, known in zip(options, allowed, strict=True):
        if str(value).strip().casefold() == str(known).casefold():
            return option.label
    raise ValueError(f"the label is {value!r}, allowed are {', '.join(map(repr, allowed))}")


def _lettered(fields: dict[str, str], texts: Sequence[Any], value: Any, allowed: Sequence[Any]) -> Question:
    """A choice among texts, labelled A, B, ...; `value` is the right one's in `allowed`."""
    if not all(isinstance(text, str) and text.strip() for text in texts):
        raise ValueError(f"the choices must be texts that are not empty, got {list(texts)!r}")
    options = tuple(Option(label, text.strip()) for label, text in zip("ABCDEFGH"[: len(texts)], texts, strict=True))
    return Question(fields, _chosen(value, options, allowed), options)


def boolq(row: Row) -> Question:
    """A question about a passage, true or false."""
    options = (Option("True"), Option("False"))
    return Question(_texts(row, "passage", "question"), _chosen(row["answer"], options, (True, False)), options)


def winogrande(row: Row) -> Question:
    """A sentence with a blank and two candidates for it."""
    options = (Option("Option1", _text(row, "option1")), Option("Option2", _text(row, "option2")))
    return Question(_texts(row, "sentence"), _chosen(row["answer"], options, ("1", "2")), options)


def mnli(row: Row) -> Question:
    """Whether a premise entails a hypothesis; label 0, 1 or 2."""
    options = (Option("ENTAILMENT"), Option("NEUTRAL"), Option("CONTRADICTION"))
    return Question(_texts(row, "premise", "hypothesis"), _chosen(row["label"], options, (0, 1, 2)), options)


def labelled(question: str) -> Callable[[Row], Question]:
    """A reader of rows whose choices have labels of their own: {"choices": {"text": [...], "label": [...]}}."""

    def read(row: Row) -> Question:
        texts, labels = row["choices"]["text"], row["choices"]["label"]
        options = tuple(Option(label, text.strip()) for label, text in zip(labels, texts, strict=True))
        return Question({"question": _text(row, question)}, _chosen(row["answerKey"], options, labels), options)

    return read


def hellaswag(row: Row) -> Question:
    """Four endings of a text."""
    fields = {"activity": _text(row, "activity_label"), "context": _text(row, "ctx")}
    return _lettered(fields, row["endings"], row["label"], range(len(row["endings"])))


def piqa(row: Row) -> Question:
    """Two ways to a goal."""
    return _lettered(_texts(row, "goal"), (row["sol1"], row["sol2"]), row["label"], (0, 1))


def siqa(row: Row) -> Question:
    """A question about a situation, three answers."""
    texts = (row["answerA"], row["answerB"], row["answerC"])
    return _lettered(_texts(row, "context", "question"), texts, row["label"], (1, 2, 3))


def aqua(row: Row) -> Question:
    """A problem with options such as "A)21", and how it is solved."""
    pairs = [str(option).partition(")") for option in row["options"]]
    options = tuple(Option(label.strip(" ("), text.strip()) for label, _, text in pairs)
    fields = _texts(row, "question", "rationale")
    return Question(fields, _chosen(row["correct"], options, [option.label for option in options]), options)


def _number(value: Any) -> str:
    """A number as a person writes it: 8.0 is 8."""
    return re.sub(r"(\.\d*?)0+$", r"\1", text).rstrip(".") if "." in (text := str(value).strip()) else text


def reasoned(row: Row) -> Question:
    """Reasoning, then "#### number"."""
    reasoning, mark, number = _text(row, "answer").rpartition("####")
    number = _number(number)
    if not number:
        raise ValueError("'answer' has no number after ####")
    # Where a row has the number alone, there is nothing to write before it.
    reasoning = reasoning.strip() + "\n" if mark and reasoning.strip() else ""
    return Question({"question": _text(row, "question"), "reasoning": reasoning, "number": number}, number)


def svamp(row: Row) -> Question:
    """A problem with the equation that solves it."""
    fields = {**_texts(row, "Body", "Question"), "reasoning": _text(row, "Equation") + "\n"}
    return Question({**fields, "number": (number := _number(row["Answer"]))}, number)


_CALCULATION = re.compile(r'<gadget id="calculator">(.*?)</gadget>\s*<output>(.*?)</output>', re.DOTALL)


def asdiv(row: Row) -> Question:
    """A problem with the calculator's steps as marked-up text."""
    steps = "".join(
        f"{expression.strip()} = {value.strip()}\n" for expression, value in _CALCULATION.findall(row["chain"])
    )
    number = _number(row["result_float"])
    return Question({"question": _text(row, "question"), "reasoning": steps, "number": number}, number)


def listops(row: Row) -> Question:
    """An expression of Long Range Arena, checked against its answer."""
    # Long Range Arena writes X for a closing bracket in some copies, and binary-tree brackets besides.
    words = _text(row, "Source").replace("(", " ").replace(")", " ").split()
    expression, answer = " ".join("]" if word == "X" else word for word in words), str(row["Target"])
    if str(value := evaluate(expression)) != answer:
        raise ValueError(f"the answer given is {answer}, but {expression} is {value}")
    return Question({"expression": expression}, answer)


def alpaca(row: Row) -> Question:
    """An instruction, perhaps with an input."""
    given = _text(row, "input", empty=True) if row.get("input") is not None else ""
    given = f"### Input:\n{given}\n\n" if given else ""
    output = _text(row, "output", empty=True)
    return Question({"instruction": _text(row, "instruction"), "given": given, "output": output}, output)


def conversation(row: Row) -> Question:
    """A list of messages."""
    return Question({}, "", turns=chat_turns(row["messages"], "messages", "conversation"))
