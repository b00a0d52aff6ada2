"""Tasks: where the examples of a data set come from, how they are put into words, and how answers are scored.

A new named task is a record (records.py) and a reader of its rows (readers.py); a new way to read an answer is a rule
(scoring.py, extract.py). Tokenising and batching belong in `train.data`; running a model on a task, in
`train.evaluation`.
"""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any, get_args

from jaxsteer.plans import did_you_mean
from train.data import Keys, ListOps, Split
from train.data.preference_rows import PreferenceKeys
from train.tasks.held_out import HeldOutTask
from train.tasks.hub import HubTask
from train.tasks.jsonl import JsonlTask
from train.tasks.listops import ListOpsTask
from train.tasks.mixture import MixtureTask, PlainTask
from train.tasks.preference import PairedTask, PreferenceTask
from train.tasks.protocols import AnswerFormat, AnyTask, typed_template
from train.tasks.records import TASKS
from train.tasks.table import TableTask

__all__ = [
    "KINDS",
    "TASKS",
    "AnswerFormat",
    "AnyTask",
    "HeldOutTask",
    "HubTask",
    "JsonlTask",
    "ListOpsTask",
    "MixtureTask",
    "PairedTask",
    "PreferenceTask",
    "Split",
    "TableTask",
    "Task",
    "on_file",
    "task_from_json",
    "task_to_json",
    "typed_template",
]

Task = PlainTask | MixtureTask | PreferenceTask | PairedTask
"""The kinds of task that a config can have. Functions that work with any task take an `AnyTask`."""

KINDS: dict[str, type] = {kind.__name__: kind for kind in get_args(Task)}
"""The kinds of task by the names that configs call them."""


def on_file(task: Task, path: str) -> Task:
    """The task with all examples of a local file as its validation and test examples.

    The file has the format of the task's data: the columns of a named task or a table, else JSON Lines. That of a
    mixture is JSON Lines, unless all its parts are of one kind: then it has the format of the first.
    """
    if isinstance(task, PairedTask):
        return on_file(task.of, path)
    if isinstance(task, MixtureTask) and len(set(map(type, task.parts))) == 1:
        return on_file(task.parts[0], path)
    if isinstance(task, ListOpsTask | MixtureTask):
        return JsonlTask(
            path,
            path,
            template=task.template,
            chat=task.chat,
            rule=task.rule,
            max_new_tokens=task.max_new_tokens,
        )
    task = replace(task, validation=path, test=path)
    return replace(task, data=None) if isinstance(task, TableTask) else task


def task_to_json(task: Task) -> dict[str, Any]:
    """A task as plain JSON values; `task_from_json` reads it back."""
    data = {"type": type(task).__name__, **asdict(task)}
    if isinstance(task, PairedTask):
        data["of"] = task_to_json(task.of)
    if isinstance(task, MixtureTask):
        data["parts"] = [task_to_json(part) for part in task.parts]
    if isinstance(task, ListOpsTask) and task.data is None:
        del data["data"]  # a setting that configs of older runs do not have
    return data


def task_from_json(data: dict[str, Any]) -> Task:
    """Read a task from what `task_to_json` returned.

    Raises:
        ValueError: a kind of task or a setting that this version does not have.
    """
    settings = {key: value for key, value in data.items() if key != "type"}
    kind = KINDS.get(data.get("type", ""))
    if kind is None:
        hint = did_you_mean(str(data.get("type")), KINDS)
        raise ValueError(f"unknown task {data.get('type')!r}{hint}; known are {', '.join(KINDS)}")
    try:
        if kind is ListOpsTask:
            problems = dict(settings["problems"])
            settings["problems"] = ListOps(**{**problems, "operations": tuple(problems["operations"])})
        if kind is JsonlTask:
            settings["keys"] = Keys(**settings["keys"])
        if kind is PreferenceTask:
            settings["keys"] = PreferenceKeys(**settings["keys"])
        if kind is PairedTask:
            settings["of"] = _part_from_json(settings["of"])
        if kind is TableTask:
            settings["choices"] = tuple(settings["choices"])
        if kind is MixtureTask:
            settings["parts"] = tuple(_part_from_json(part) for part in settings["parts"])
            settings |= {name: tuple(settings[name]) for name in ("weights", "names")}
        return kind(**settings)
    except (TypeError, KeyError) as error:
        raise ValueError(f"task {data}: cannot be read ({error})") from None


def _part_from_json(data: dict[str, Any]) -> PlainTask:
    """A part of a mixture.

    Raises:
        ValueError: as `task_from_json`; or the part is a mixture itself.
    """
    if not isinstance(data, dict):
        raise ValueError(f"a part of a mixture must be an object, got {data!r}")
    part = task_from_json(data)
    if isinstance(part, MixtureTask | PreferenceTask | PairedTask):
        raise ValueError(f"a {data.get('type')} cannot be a part of a mixture, nor can pairs be made of it")
    return part
