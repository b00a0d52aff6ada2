"""Tasks: what is asked, what is right, and where the examples come from."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any

from train.data import Keys, ListOps
from train.tasks.hub import HubTask
from train.tasks.jsonl import JsonlTask
from train.tasks.listops import ListOpsTask
from train.tasks.record import Split
from train.tasks.records import TASKS
from train.tasks.table import TableTask

__all__ = [
    "TASKS",
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
_KINDS: dict[str, type] = {kind.__name__: kind for kind in (ListOpsTask, JsonlTask, HubTask, TableTask)}


def on_file(task: Task, path: str) -> Task:
    """The task with a local file's examples, all of them, for validation and test.

    The file has the form of the task's own data: the columns of a named task or a table, a JSON line of prompt and
    completion otherwise.
    """
    if isinstance(task, ListOpsTask):
        keep = {"template": task.template, "chat": task.chat, "rule": task.rule, "max_new_tokens": task.max_new_tokens}
        return JsonlTask(path, path, **keep)  # type: ignore[arg-type]  # each value has its field's type
    task = replace(task, validation=path, test=path)
    return replace(task, data=None) if isinstance(task, TableTask) else task


def task_to_json(task: Task) -> dict[str, Any]:
    """A task as plain JSON values; `task_from_json` reads it back."""
    data = {"type": type(task).__name__, **asdict(task)}
    if isinstance(task, ListOpsTask) and task.data is None:
        del data["data"]  # a setting that configs of older runs do not have
    return data


def task_from_json(data: dict[str, Any]) -> Task:
    """Read a task back.

    Raises:
        ValueError: a type or a setting that this version does not know.
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
