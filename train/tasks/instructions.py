"""Rows of LLM-Adapters: {"instruction", "output", "answer"}, which several named tasks exist as, too."""

from __future__ import annotations

import re
from dataclasses import replace

from train.tasks.record import EmptyText, Option, Question, Record, Row

COLUMNS = ("instruction", "output", "answer")

# "Please choose ...: Which is it?\n\nAnswer1: cold Answer2: warm\n\nAnswer format: answer1/answer2"
_LEAD = re.compile(r"Please [^:]*: ")
_ALLOWED = re.compile(r"\s*Answer format: (\S+)\s*$")
_LISTED = re.compile(r"(?:^|(?<=\s))(?:Answer|Option|Ending|Solution)([1-9]): ")


def as_instructions(record: Record) -> Record:
    """The same task, read from instructions instead: prompt and completion are the row's own."""
    return replace(
        record,
        columns=COLUMNS,
        read=read,
        prompt="{lead}{body}{options}{after}\n",
        completion="{said}{label}{rest}",
        choice=None,
        option="{Label}: {text}",
        between=" ",
        paraphrases=("{body}{options}{after}\n", "Here is something to answer. {body}{options}{after}\n"),
    )


def read(row: Row) -> Question:
    """An instruction, taken apart as far as it has parts: lead ("Please choose ...: "), candidates, allowed answers.

    Raises:
        ValueError: an answer that is not among those that the instruction allows.
    """
    text, output, answer = (str(row[name]).strip() for name in COLUMNS)
    for name, value in zip(COLUMNS, (text, output, answer), strict=True):
        if not value:
            raise EmptyText(f"{name!r} is empty")
    lead = found[0] if (found := _LEAD.match(text)) else ""
    fields = {"lead": lead, "body": text[len(lead) :], "after": "", "said": output, "label": "", "rest": ""}
    allowed = _ALLOWED.search(fields["body"])
    if allowed is None:
        return Question(fields, answer)
    labels = allowed[1].split("/")
    if answer not in labels:
        raise ValueError(f"the label is {answer!r}, allowed are {', '.join(map(repr, labels))}")
    if answer not in output:
        raise ValueError(f"the output {output!r} does not have the answer {answer!r} in it")
    said, _, rest = output.rpartition(answer)
    stem, after = fields["body"][: allowed.start()], fields["body"][allowed.start() :]
    fields |= {"body": stem, "after": after, "said": said, "rest": rest}
    before, *listed = _LISTED.split(stem)
    texts = [each.strip() for each in listed[1::2]]
    if listed[::2] == [label[-1] for label in labels]:
        options = tuple(map(Option, labels, texts))
        # Only where nothing is lost: the candidates are written anew.
        if before + " ".join(f"{option.label.capitalize()}: {option.text}" for option in options) == stem:
            return Question(fields | {"body": before}, answer, options)
    return Question(fields, answer, tuple(map(Option, labels)))
