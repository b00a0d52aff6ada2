"""Settings beside their defaults, what differs between runs, and the commands that make a run again and use it."""

from __future__ import annotations

import dataclasses
import json
import shlex
from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

from train import config as runs
from train.plain import TYPE, to_plain
from train.report.record import Record
from train.run.changes import MISSING, flat, same
from train.run.result import bare
from train.tasks import KINDS


class Setting(NamedTuple):
    """A setting by its whole name, its value and default as JSON, and whether they differ."""

    name: str
    value: str
    default: str
    changed: bool


def settings_of(config: Mapping[str, Any]) -> list[Setting]:
    """Every setting of a run; the defaults of its task are those of the same kind of task."""
    values, usual = flat(config), flat(_defaults(config))
    return [
        Setting(name, shown(value), shown(usual.get(name, MISSING)), not same(value, usual.get(name, MISSING)))
        for name, value in values.items()
    ]


def _defaults(config: Mapping[str, Any]) -> dict[str, Any]:
    usual = to_plain(runs.KINDS[runs.program_of(config)]().to_json())
    task = config.get("task")
    kind = KINDS.get(task.get(TYPE, "")) if isinstance(task, Mapping) else None
    if kind is None:
        return {name: value for name, value in usual.items() if name != "task"}
    fields = {field.name: _default(field) for field in dataclasses.fields(kind)}
    known = {name: to_plain(value) for name, value in fields.items() if value is not dataclasses.MISSING}
    return usual | {"task": {TYPE: kind.__name__, **known}}


def _default(field: dataclasses.Field) -> Any:
    """A field's default; MISSING if it has none."""
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def shown(value: Any) -> str:
    """A setting's value as JSON; nothing for one that is missing."""
    return "" if value is MISSING else json.dumps(value, ensure_ascii=False)


class Difference(NamedTuple):
    """A setting in which runs differ, and its value in each."""

    name: str
    values: list[str]


def differences(configs: Sequence[Mapping[str, Any]]) -> list[Difference]:
    """The settings that are not the same in all of several runs."""
    each = [flat(config) for config in configs]
    names = list(dict.fromkeys(name for values in each for name in values))
    rows = [Difference(name, [shown(values.get(name, MISSING)) for values in each]) for name in names]
    return [row for row in rows if len(set(row.values)) > 1]


def as_yaml(config: Mapping[str, Any]) -> str:
    """The settings as a config file: with them as FILE.yaml its command makes the same run again.

    Raises:
        ValueError: they are those of another version.
    """
    import yaml

    plain = runs.plain_run(runs.parse_run(config, "config.json"))
    kept = {name: plain[name] for name in config}
    return yaml.safe_dump(kept, sort_keys=False, allow_unicode=True, width=100)


def starts_of(record: Record) -> list[str]:
    """The commands that the run was started with, as a shell reads them; equal neighbours once."""
    words = [start.get("command") for start in record.starts]
    lines = [shlex.join(map(str, each)) for each in words if isinstance(each, list) and each]
    return [line for line, _ in groupby(lines)]


def uses_of(record: Record) -> list[str]:
    """Commands that use the steering of a finished run, or continue one that has not finished."""
    folder = str(record.run.folder)
    if record.summary is None:
        return [shlex.join(["jaxsteer", runs.program_of(record.config), "--resume", "--out", folder])]
    if record.steering is None:
        model = ["jaxsteer", "generate", "none", "YOUR QUESTION", "--model", str(Path(folder) / "model")]
        return [shlex.join(model)] if record.config.get("train_base") else []
    commands = [["jaxsteer", "generate", folder, _question(record), "--compare"]]
    commands += [["jaxsteer", "evaluate", folder], ["jaxsteer", "inspect", folder]]
    return [shlex.join(words) for words in commands]


def _question(record: Record) -> str:
    """A test question as a person would type it, where the answers tell: prompts in a chat template do not."""
    assert record.steering is not None
    notes = record.steering.notes
    template = notes.get("template")
    if notes.get("chat") or not record.before or not isinstance(template, str):
        return "YOUR QUESTION"
    prompt = bare(record.before[-1].prompt, template)
    return prompt if prompt and "\n" not in prompt and not prompt.startswith("-") else "YOUR QUESTION"
