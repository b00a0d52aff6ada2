"""Test answers before and after, and validation answers in the course of a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any, NamedTuple

from train.evaluation.answers import ScoredAnswer
from train.evaluation.statistics import Paired, compare_answers, key_of

KINDS = {
    "gained": "became right",
    "lost": "became wrong",
    "right": "stayed right",
    "wrong": "stayed wrong",
}
"""How training can change an answer, in the order of the filters."""

MOST_CHARACTERS = 3000
"""Maximum number of characters shown of a text."""


class Reply(NamedTuple):
    """An answer as it is shown; whether it is right is None where there is no right answer."""

    text: str
    right: bool | None
    cut_off: bool


class ReplyRow(NamedTuple):
    """A question with its answers before and after; before a run has finished, only the first."""

    number: int
    prompt: str
    expected: str
    before: Reply
    after: Reply | None
    kind: str


class ReplyTable(NamedTuple):
    """Answers before and after.

    rows    those that are shown
    counts  of all, by kind: how many there are, and how many are shown
    total   number of questions
    change  the difference in accuracy with its interval, in words; "" if nothing is marked, or nothing to compare
    """

    rows: list[ReplyRow]
    counts: dict[str, tuple[int, int]]
    total: int
    change: str


def reply_table(before: Sequence[ScoredAnswer], after: Sequence[ScoredAnswer], most: int) -> ReplyTable | None:
    """Pair the answers to the same questions.

    Args:
        before: of the pretrained model.
        after: of the trained one; [] of a run that has not finished.
        most: maximum number of rows, spread evenly over the kinds.

    Raises:
        ValueError: the two do not answer the same questions.
    """
    if not before:
        return None
    change = _in_words(compare_answers(after, before)) if after else ""
    trained = {key_of(answer): answer for answer in after}
    rows = [_row(n, answer, trained.get(key_of(answer))) for n, answer in enumerate(before, 1)]
    shown = _chosen(rows, most)
    of_kind = lambda some, kind: sum(row.kind == kind for row in some)
    counts = {kind: (of_kind(rows, kind), of_kind(shown, kind)) for kind in KINDS} if after else {}
    return ReplyTable(shown, counts, len(rows), change)


def _in_words(found: Paired) -> str:
    points = f"{100 * found.difference:+.1f} points (95 %: {100 * found.low:+.1f} to {100 * found.high:+.1f})"
    return f"The difference in accuracy is {points}; McNemar's p = {found.p:.2g}"


def _row(number: int, before: ScoredAnswer, after: ScoredAnswer | None) -> ReplyRow:
    right = (before.correct, after.correct if after else before.correct)
    kind = {(False, True): "gained", (True, False): "lost", (True, True): "right"}.get(right, "wrong")
    expected = "" if before.gold is None else shortened(before.gold)
    later = _reply(vars(after)) if after else None
    return ReplyRow(number, shortened(before.prompt), expected, _reply(vars(before)), later, kind)


def _reply(answer: Mapping[str, Any]) -> Reply:
    right = None if answer["gold"] is None else bool(answer["correct"])
    return Reply(shortened(answer["output"]), right, bool(answer["truncated"]))


def _chosen(rows: Sequence[ReplyRow], most: int) -> list[ReplyRow]:
    """At most `most` rows in their order, with kinds as evenly represented as their numbers allow."""
    left = {kind: [row for row in rows if row.kind == kind] for kind in KINDS}
    chosen: list[ReplyRow] = []
    while len(chosen) < most and any(left.values()):
        chosen += [some.pop(0) for some in left.values() if some][: most - len(chosen)]
    return sorted(chosen, key=lambda row: row.number)


def shortened(text: Any) -> str:
    """A text, or its beginning with a note on its length."""
    text = str(text)
    return text if len(text) <= MOST_CHARACTERS else f"{text[:MOST_CHARACTERS]} … ({len(text):,} characters)"


class Course(NamedTuple):
    """A validation question, and its answers: (steps, answer) with the steps at which it was the same."""

    prompt: str
    expected: str
    answers: list[tuple[str, Reply]]


def courses_of(during: Sequence[dict[str, Any]]) -> list[Course]:
    """The answers to each validation question in the course of a run, equal neighbours together."""
    found: dict[str, list[dict[str, Any]]] = {}
    for row in during:
        found.setdefault(str(row["source"]), []).append(row)
    return [_course(rows) for rows in found.values()]


def _course(rows: Sequence[dict[str, Any]]) -> Course:
    gold, answers = rows[0]["gold"], []
    for _, equal in groupby(rows, key=lambda row: row["output"]):
        first, *others = equal
        steps = f"{first['step']} to {others[-1]['step']}" if others else str(first["step"])
        answers.append((steps, _reply(first)))
    return Course(shortened(rows[0]["prompt"]), "" if gold is None else shortened(gold), answers)
