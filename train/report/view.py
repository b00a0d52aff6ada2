"""The parts of the page about one run: what was trained on what, with which result, when and where."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from train.config import program_of
from train.display.plan_rows import PlanRow, plan_rows
from train.report.chart import Drawing
from train.report.curves import curves_of
from train.report.record import Accuracy, Record
from train.report.replies import Course, ReplyTable, courses_of, reply_table
from train.report.settings import Setting, as_yaml, settings_of, starts_of, uses_of
from train.report.updates import UpdateRow, update_rows
from train.report.words import count, date, duration, facts, listed, moment, share, small_share
from train.run.preview import size

Facts = dict[str, str]


class Tile(NamedTuple):
    """A figure at the top, with what it is and a line below it."""

    label: str
    value: str
    detail: str = ""


class Outcome(NamedTuple):
    """A figure before and after training."""

    what: str
    before: str
    after: str


@dataclass(frozen=True)
class View:
    """All that is shown of one run.

    record      what its folder holds
    title       what was trained
    subject     for which model, on what
    state       "" of a finished run; else a sentence
    notes       what a reader should know: resumed, changed, skipped, stopped early
    tiles       the figures at the top
    accuracy    before and after, for the picture
    outcomes    all figures of the result
    sections    facts on model, data, time and machine
    plan        its rows; [] without a steering file
    provenance  how the steering came about
    charts      the curves
    replies     test answers; None if there are none
    courses     validation answers in the course of training
    updates     how large the updates are
    settings    all of them
    starts, uses  commands that started it, and that use what it trained
    yaml        its settings as a config file, of which `program` is the command
    problems    sentences on what is missing or damaged
    """

    record: Record
    title: str
    subject: str
    state: str
    notes: list[str]
    tiles: list[Tile]
    accuracy: list[tuple[str, Accuracy]]
    outcomes: list[Outcome]
    sections: dict[str, Facts]
    plan: list[PlanRow]
    provenance: list[str]
    charts: list[Drawing]
    replies: ReplyTable | None
    courses: list[Course]
    updates: list[UpdateRow]
    settings: list[Setting]
    starts: list[str]
    uses: list[str]
    yaml: str
    program: str
    problems: list[str]


def view_of(record: Record, examples: int) -> View:
    """Everything about a run; a part that cannot be made becomes a sentence among the problems.

    Args:
        record: what its folder holds.
        examples: maximum number of answers.
    """
    attempt, config, file = record.attempt, record.config, record.steering
    compared = record.after if record.summary else []
    return View(
        record=record,
        title=_title(config),
        subject=attempt(record.run.inputs, lambda: _subject(record)) or "",
        state=_state(record),
        notes=_notes(record),
        tiles=attempt("the figures at the top", lambda: list(_tiles(record))) or [],
        accuracy=_accuracy(record),
        outcomes=attempt(record.run.summary, lambda: list(_outcomes(record))) or [],
        sections={
            "Model": attempt("the model", lambda: _model(record)) or {},
            "Data": attempt(record.run.inputs, lambda: _data(record)) or {},
            "Time": attempt(record.run.starts, lambda: _time(record)) or {},
            "Machine": attempt(record.run.starts, lambda: _machine(record)) or {},
        },
        plan=attempt("the plan", lambda: plan_rows(file.plan, file.steering, file.config.layers)) or [] if file else [],
        provenance=attempt("the provenance", lambda: list(_provenance(record))) or [],
        charts=attempt(record.run.metrics, lambda: curves_of([record])) or [],
        replies=attempt("the answers", lambda: reply_table(record.before, compared, examples)),
        courses=attempt(record.run.answers_during, lambda: courses_of(record.during)) or [],
        updates=attempt("the sizes of the updates", lambda: update_rows(file)) or [] if file else [],
        settings=settings_of(config),
        starts=attempt(record.run.starts, lambda: starts_of(record)) or [],
        uses=attempt("the commands", lambda: uses_of(record)) or [],
        yaml=attempt(record.run.config, lambda: as_yaml(config)) or "",
        program=program_of(config),
        problems=list(dict.fromkeys(record.problems)),
    )


def _title(config: Mapping[str, Any]) -> str:
    plan = config["plan"]
    trained = [*plan] if isinstance(plan, list) else [str(plan)]
    trained += ["all weights"] if config.get("train_base") else []
    return ", ".join(map(str, trained))


def _subject(record: Record) -> str:
    data = record.inputs.get("train")
    on = f" on {data['examples']:,} examples of {listed(data['sources'], 3)}" if data else ""
    return f"for {record.config.get('model')}, trained{on}"


def _state(record: Record) -> str:
    """Why there is no result; "" if there is one."""
    if record.summary is not None:
        return ""
    if record.run.summary.exists():
        return "The result of this run cannot be read."
    of = f" of {record.planned:,}" if record.planned else ""
    if not record.steps:
        return "This run has not finished: it had done no step yet when this report was made."
    return f"This run has not finished: it had done {record.done:,}{of} steps when this report was made."


def _notes(record: Record) -> list[str]:
    """What a reader should know of the run's course, in sentences."""
    run, attempt = record.run, record.attempt
    return [
        *(attempt(run.starts, lambda: list(_resumptions(record))) or []),
        *(attempt(run.history, lambda: list(_changes(record))) or []),
        *(attempt(run.metrics, lambda: list(_incidents(record))) or []),
    ]


def _resumptions(record: Record) -> Iterator[str]:
    if resumed := [start["done"] for start in record.starts[1:]]:
        times = "once" if len(resumed) == 1 else f"{len(resumed)} times"
        yield f"It was resumed {times}, from step {listed([f'{step:,}' for step in resumed])}."


def _changes(record: Record) -> Iterator[str]:
    for change in record.history:
        texts = [f"{name} from {old} to {new}" for name, (old, new) in change["changed"].items()]
        yield f"Changed on purpose after {change['steps']:,} steps ({date(change['time'])}): {listed(texts, 12)}."


def _incidents(record: Record) -> Iterator[str]:
    if skipped := [row["step"] for row in record.steps if "examples" in row]:
        steps = "step" if len(skipped) == 1 else "steps"
        stopped = not any("skipped" in row for row in record.steps)
        kept = "the run stopped there" if stopped else "the updates were skipped"
        yield f"Loss or gradient was not finite at {steps} {listed([f'{step:,}' for step in skipped])}: {kept}."
    summary, planned = record.summary, record.planned
    if summary and planned and record.done < planned:
        yield f"It stopped early, after {record.done:,} of {planned:,} steps, because it did not improve any more."
    if summary and isinstance(summary.step, int) and 0 < summary.step < record.done:
        yield f"The state of step {summary.step:,} was kept, the best by validation."


def _tiles(record: Record) -> Iterator[Tile]:
    summary = record.summary
    if summary is None:
        yield Tile("steps done", f"{record.done:,}", f"of {record.planned:,}" if record.planned else "")
        losses = [row["loss"] for row in record.steps]
        if losses:
            yield Tile("training loss", f"{losses[-1]:.4g}", f"{losses[0]:.4g} at the first step")
        if record.starts:
            trained, total = record.starts[-1]["trainable"], record.starts[-1]["parameters"]
            yield Tile("trained", count(trained), f"{small_share(trained / total)} of {count(total)} parameters")
        return
    if summary.after:
        before = f"from {share(summary.before.value)} before" if summary.before else ""
        yield Tile("test accuracy", share(summary.after.value), before)
    for split, stages in summary.losses.items():
        if "after" in stages and (split == "test" or not summary.after):
            yield from _leading(split, stages)
    total = f"{small_share(summary.share)} of the model's {_total(record)}"
    yield Tile("trained parameters", count(summary.trainable), total)
    waited = f"{duration(summary.waited)} of it waiting for data" if summary.waited > 0.01 * summary.seconds else ""
    yield Tile("training time", duration(summary.seconds), waited or f"{record.done:,} steps")
    yield Tile("speed", f"{summary.speed:,.0f}", "tokens per second")
    yield Tile("peak memory", size(summary.memory))


def _leading(split: str, stages: Mapping[str, Mapping[str, float]]) -> Iterator[Tile]:
    """The figure that a split is judged by: its loss, or what its command measures instead."""
    four = lambda value: f"{value:.4g}"
    shown = {"loss": four, "pair_accuracy": share, "teacher_kl": four}
    name = next((name for name in shown if name in stages["after"]), None)
    if name is not None:
        after, before = (stages.get(stage, {}).get(name) for stage in ("after", "before"))
        was = "" if before is None else f"from {shown[name](before)} before"
        yield Tile(f"{split} {_FIGURES[name][0]}", shown[name](after), was)


def _total(record: Record) -> str:
    """The number of the base's parameters."""
    if record.starts:
        return count(record.starts[-1]["parameters"])
    assert record.summary is not None
    return f"about {round(record.summary.trainable / record.summary.share):,}"


def _accuracy(record: Record) -> list[tuple[str, Accuracy]]:
    summary = record.summary
    stages = [("before", summary.before), ("after", summary.after)] if summary else []
    return [(name, found) for name, found in stages if found]


_FIGURES = {
    "loss": ("loss", lambda value: f"{value:.4f}"),
    "perplexity": ("perplexity", lambda value: f"{value:.4g}"),
    "token_accuracy": ("tokens right", share),
    "accuracy": ("accuracy", share),
    "pair_accuracy": ("pairs right", share),
    "pair_ranking": ("pairs of which the chosen answer is likelier", share),
    "margin": ("margin", lambda value: f"{value:.3f}"),
    "teacher_kl": ("KL from the teacher", lambda value: f"{value:.4f}"),
}


def _outcomes(record: Record) -> Iterator[Outcome]:
    summary = record.summary
    if summary is None:
        return
    if summary.after:
        of = f" of {summary.after.examples:,} answers" if summary.after.examples else ""
        yield Outcome(f"test accuracy{of} (95 %)", str(summary.before or ""), str(summary.after))
    for split, stages in summary.losses.items():
        for name, (title, show) in _FIGURES.items():
            values = [stages.get(stage, {}).get(name, math.nan) for stage in ("before", "after")]
            if not all(map(math.isnan, values)):
                texts = ["" if math.isnan(value) else show(value) for value in values]
                yield Outcome(f"{split} {title}", *texts)
    for name, found in record.evaluations.items():
        yield Outcome(f"accuracy found later by jaxsteer evaluate: {name} (95 %)", "", str(found))


def _model(record: Record) -> Facts:
    config, inputs = record.config, record.inputs
    values = {"base model": str(config.get("model"))}
    if record.summary or record.starts:
        values["parameters"] = _total(record)
    values["weights"] = config.get("dtype", "") + (", int8" if config.get("quantise") == "int8" else "")
    if digest := inputs.get("model", {}).get("sha256"):
        values["sample of them, SHA-256"] = digest
    if record.steering:
        with record.steering.path.open("rb") as file:
            values["steering file"] = str(record.steering.path)
            values["steering, SHA-256"] = hashlib.file_digest(file, "sha256").hexdigest()
    if config.get("train_base"):
        values["trained model"] = str(record.run.folder / "model")
    return values


def _data(record: Record) -> Facts:
    task, values = record.config.get("task", {}), {}
    values["task"] = str(task.get("type", "?")) + (f" {task['name']}" if task.get("name") else "")
    for split in ("train", "validation", "test"):
        if split not in record.inputs:
            continue
        data = record.inputs[split]
        amounts = [f"{data['examples']:,} examples"]
        amounts += [f"{data['tokens']:,} tokens"] if "tokens" in data else []
        amounts += [f"{data['supervised']:,} of them with a loss"] if "supervised" in data else []
        values[split] = f"{', '.join(amounts)} from {listed(data['sources'])}"
        values[f"{split}, SHA-256"] = data["sha256"]
    if record.before:
        values["test"] = f"{len(record.before):,} examples"
    return values


def _time(record: Record) -> Facts:
    starts, summary, values = record.starts, record.summary, {}
    if starts:
        values["started"] = date(starts[0]["time"])
    for start in starts[1:]:
        values[f"resumed from step {start['done']:,}"] = date(start["time"])
    if summary and summary.finished:
        values["finished"] = date(summary.finished)
        began, ended = moment(starts[0]["time"]) if starts else None, moment(summary.finished)
        if began and ended:
            values["from start to end"] = duration((ended - began).total_seconds())
    if summary:
        values["in training steps"] = duration(summary.seconds)
    values["steps"] = f"{record.done:,}" + (f" of {record.planned:,}" if record.planned else "")
    if not starts:
        values["started"] = "not noted: no starts.jsonl, as in runs of earlier versions"
    return values


def _machine(record: Record) -> Facts:
    """The machine of the first start, and what differed at later ones."""
    values: Facts = {}
    for number, start in enumerate(record.starts, 1):
        machine = start["machine"]
        found = {
            "devices": start["device"],
            "processor": f"{machine['processor']}, {machine['cores']} cores, {machine['memory_gb']} GB",
            "system": machine["system"],
            "versions": facts(start["versions"]),
        }
        for name, value in found.items():
            if values.get(name, value) == value:
                values[name] = value
            else:
                values[f"{name}, start {number}"] = value
    if not record.starts and record.steering:
        values["versions"] = facts(record.steering.versions)
    return values


def _provenance(record: Record) -> Iterator[str]:
    """How the steering came about, oldest step first."""
    inputs, began = record.inputs, []
    while isinstance(inputs.get("start_from"), dict):
        inputs = inputs["start_from"]
        began.append(inputs)
        inputs = inputs.get("inputs", {})
    for each in reversed(began):
        data = each.get("inputs", {}).get("train")
        on = f", trained on {data['examples']:,} examples of {listed(data['sources'])}" if data else ""
        yield f"{each['path']} (steering for {each.get('model', '?')}, SHA-256 {each.get('sha256', '?')}){on}"
    for step in record.steering.provenance if record.steering else []:
        what = {name: value for name, value in step.items() if name not in ("by", "plan", "config")}
        yield f"{step.get('by', '?')}: {facts(what)}"
