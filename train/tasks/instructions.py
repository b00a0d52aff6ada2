"""Rows in the instruction format of LLM-Adapters, {"instruction", "output", "answer"}, as a variant of named tasks."""

from __future__ import annotations

import re
from dataclasses import replace

from train.data.fields import as_text
from train.tasks.record import Option, Question, Record, Row

COLUMNS = ("instruction", "output", "answer")

# "Please choose ...: Which is it?\n\nAnswer1: cold Answer2: warm\n\nAnswer format: answer1/answer2"
_LEAD = re.compile(r"Please [^:]*: ")
_ALLOWED = re.compile(r"\s*Answer format: (\S+)\s*$")
_LISTED = re.compile(r"(?:^|(?<=\s))(?:Answer|Option|Ending|Solution)([1-9]): ")


def as_instructions(record: Record) -> Record:
    """The same task, read from instructions: prompt and completion are those of the row."""
    return replace(
        record,
        columns=COLUMNS,
        read=read,
        prompt="{lead}{body}{options}{after}\n",
        completion="{said}{label}{rest}",
        choice=None,
        option="{Label}: {text}",
        separator=" ",
        paraphrases=("{body}{options}{after}\n", "Here is something to answer. {body}{options}{after}\n"),
    )


def read(row: Row) -> Question:
    """Split an instruction into its parts, if it has them: lead ("Please choose ...: "), candidates, allowed answers.

    Raises:
        ValueError: an answer that the instruction does not allow, or that its output does not contain.
    """
    instruction, output, answer = (as_text(row[name], name).strip() for name in COLUMNS)
    match = _LEAD.match(instruction)
    lead = match[0] if match else ""
    body = instruction[len(lead) :]
    fields = {"lead": lead, "body": body, "after": "", "said": output, "label": "", "rest": ""}
    allowed = _ALLOWED.search(body)
    if allowed is None:
        return Question(fields, answer)
    labels = allowed[1].split("/")
    if answer not in labels:
        raise ValueError(f"the label is {answer!r}, allowed are {', '.join(map(repr, labels))}")
    if answer not in output:
        raise ValueError(f"the output {output!r} does not contain the answer {answer!r}")
    body, after = body[: allowed.start()], body[allowed.start() :]
    said, _, rest = output.rpartition(answer)
    fields |= {"body": body, "after": after, "said": said, "rest": rest}
    question, *listed = _LISTED.split(body)
    texts = [text.strip() for text in listed[1::2]]
    if listed[::2] == [label[-1] for label in labels]:
        options = tuple(map(Option, labels, texts))
        # Only if the list can be written again without loss.
        if question + " ".join(f"{option.label.capitalize()}: {option.text}" for option in options) == body:
            return Question(fields | {"body": question}, answer, options)
    return Question(fields, answer, tuple(map(Option, labels)))
