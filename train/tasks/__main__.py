"""Write the list of named tasks into its page: `python -m train.tasks`."""

from __future__ import annotations

from pathlib import Path

from train.tasks.record import Record
from train.tasks.records import TASKS

PAGE = Path("docs/tasks.md")


def main() -> None:
    """Replace what stands between the marks."""
    before, _, after = PAGE.read_text("utf-8").split("<!-- generated -->")
    mark = "<!-- generated -->"
    PAGE.write_text(f"{before}{mark}\n\n{documentation().strip()}\n\n{mark}{after}", "utf-8")


if __name__ == "__main__":
    main()


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
