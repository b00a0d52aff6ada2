"""The list of named tasks as Markdown, made from their records."""

from __future__ import annotations

from train.tasks.record import Record
from train.tasks.records import TASKS

_HEADER = "| name | task | on the hub | train, validation, test | answer | new tokens |\n|---|---|---|---|---|---|"


def documentation() -> str:
    """The table, and every task's prompt and completion."""
    rows = [_row(name, record) for name, record in TASKS.items()]
    texts = [_templates(name, record) for name, record in TASKS.items() if record.prompt]
    return "\n".join([_HEADER, *rows, "", *texts])


def _row(name: str, record: Record) -> str:
    source = f"`{record.source}`" + (f", `{record.subset}`" if record.subset else "")
    parts = ", ".join(str(record.splits[split]) for split in ("train", "validation", "test"))
    return f"| `{name}` | {record.title} | {source} | {parts} | {record.rule} | {record.max_new_tokens} |"


def _templates(name: str, record: Record) -> str:
    option = f"{{options}}: `{record.option}`, one a line. " if "{options}" in record.prompt else ""
    columns = ", ".join(record.columns)
    return f"**{name}** {option}Columns: {columns}.\n\n```text\n{record.prompt}{record.completion}\n```\n"
