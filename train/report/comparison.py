"""Several runs side by side: their results, and the settings in which they differ."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from train.evaluation.statistics import compare_answers, key_of
from train.report.chart import Drawing
from train.report.curves import curves_of
from train.report.record import Record
from train.report.settings import Difference, differences
from train.report.words import count, duration


class Line(NamedTuple):
    """The results of one run; "" for what it does not have."""

    name: str
    color: int
    accuracy: str
    minus_first: str
    loss: str
    trained: str
    steps: str
    time: str
    speed: str


class Comparison(NamedTuple):
    """What is shown of several runs together."""

    lines: list[Line]
    differences: list[Difference]
    charts: list[Drawing]


def comparison_of(records: Sequence[Record]) -> Comparison:
    """Compare runs; those of different tasks or models too."""
    lines = [_line(n, record, records[0]) for n, record in enumerate(records)]
    charts = records[0].attempt("the curves of all runs", lambda: curves_of(records)) or []
    return Comparison(lines, differences([record.config for record in records]), charts)


def _line(number: int, record: Record, first: Record) -> Line:
    summary = record.summary
    of = f" of {record.planned:,}" if record.planned and record.planned != record.done else ""
    return Line(
        name=record.name,
        color=number,
        accuracy=str(summary.after or "") if summary else "",
        minus_first="" if record is first else _minus(record, first),
        loss=_loss(record),
        trained=count(summary.trainable) if summary else "",
        steps=f"{record.done:,}{of}" + ("" if summary else ", not finished"),
        time=duration(summary.seconds) if summary else "",
        speed=f"{summary.speed:,.0f}" if summary else "",
    )


def _minus(record: Record, first: Record) -> str:
    """The difference in test accuracy from the first run, on the questions that both answer."""
    if not (record.summary and first.summary and record.after and first.after):
        return ""
    common = set(map(key_of, record.after)) & set(map(key_of, first.after))
    here, there = ([answer for answer in each.after if key_of(answer) in common] for each in (record, first))
    if not common or len(here) != len(there):
        return "other test examples"
    found = compare_answers(here, there)
    points = [100 * value for value in (found.difference, found.low, found.high)]
    on = f", on {len(common):,} common questions" if len(common) < max(len(record.after), len(first.after)) else ""
    return f"{points[0]:+.1f} points ({points[1]:+.1f} to {points[2]:+.1f}{on})"


def _loss(record: Record) -> str:
    """The last loss that is known: of the test or validation examples, else of training."""
    losses = record.summary.losses if record.summary else {}
    for split in ("test", "validation"):
        if "loss" in losses.get(split, {}).get("after", {}):
            return f"{losses[split]['after']['loss']:.4f} ({split})"
    last = [row["loss"] for row in record.steps[-10:] if isinstance(row["loss"], float)]
    return f"{sum(last) / len(last):.4f} (training)" if last else ""
