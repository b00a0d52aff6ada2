"""Tasks: where the examples of a data set come from, how they are put into words, and how answers are scored.

A new named task is a record (records.py) and a reader of its rows (readers.py); a new way to read an answer is a rule
(scoring.py, extract.py). Tokenising and batching belong in `train.data`; running a model on a task, in
`train.evaluation`.
"""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any

from train.data import Keys, ListOps, Split
from train.tasks.held_out import HeldOutTask
from train.tasks.hub import HubTask
from train.tasks.jsonl import JsonlTask
from train.tasks.listops import ListOpsTask
from train.tasks.protocols import AnswerFormat, AnyTask
from train.tasks.records import TASKS
from train.tasks.table import TableTask

__all__ = [
    "TASKS",
    "AnswerFormat",
    "AnyTask",
    "HeldOutTask",
    "HubTask",
    "JsonlTask",
    "ListOpsTask",
    "Split",
    "TableTask",
    "Task",
    "on_file",
    "task_from_json",
    "task_to_json",
]

Task = ListOpsTask | JsonlTask | HubTask | TableTask
"""The kinds of task that a config can have. Functions that work with any task take an `AnyTask`."""

_KINDS: dict[str, type] = {kind.__name__: kind for kind in (ListOpsTask, JsonlTask, HubTask, TableTask)}


def on_file(task: Task, path: str) -> Task:
    """The task with all examples of a local file as its validation and test examples.

    The file has the format of the task's data: the columns of a named task or a table, else JSON Lines with a prompt
    and a completion.
    """
    if isinstance(task, ListOpsTask):
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
    if isinstance(task, ListOpsTask) and task.data is None:
        del data["data"]  # a setting that configs of older runs do not have
    return data


def task_from_json(data: dict[str, Any]) -> Task:
    """Read a task from what `task_to_json` returned.

    Raises:
        ValueError: a kind of task or a setting that this version does not have.
    """
    settings = {key: value for key, value in data.items() if key != "type"}
    kind = _KINDS.get(data.get("type", ""))
    if kind is None:
        raise ValueError(f"unknown task {data.get('type')!r}; known are {', '.join(_KINDS)}")
    try:
        if kind is ListOpsTask:
            problems = dict(settings["problems"])
            settings["problems"] = ListOps(**{**problems, "operations": tuple(problems["operations"])})
        if kind is JsonlTask:
            settings["keys"] = Keys(**settings["keys"])
        if kind is TableTask:
            settings["choices"] = tuple(settings["choices"])
        return kind(**settings)
    except (TypeError, KeyError) as error:
        raise ValueError(f"task {data}: cannot be read ({error})") from None
