"""Write the list of named tasks into docs/tasks.md: `python -m train.tasks`, in the root of the repository."""

from __future__ import annotations

from pathlib import Path

from train.tasks.record import Record
from train.tasks.records import TASKS

PAGE = Path("docs/tasks.md")
MARK = "<!-- generated -->"

_HEADER = """\
| name | task | hub data set | train, validation, test | answer rule | max. new tokens |
|---|---|---|---|---|---|"""


def main() -> None:
    """Replace the text between the marks."""
    before, _, after = PAGE.read_text("utf-8").split(MARK)
    PAGE.write_text(f"{before}{MARK}\n\n{documentation().strip()}\n\n{MARK}{after}", "utf-8")


def documentation() -> str:
    """A table of the tasks, and the templates of each."""
    rows = [_row(name, record) for name, record in TASKS.items()]
    templates = [_templates(name, record) for name, record in TASKS.items() if record.prompt]
    return "\n".join([_HEADER, *rows, "", *templates])


def _row(name: str, record: Record) -> str:
    source = f"`{record.source}`" + (f", `{record.subset}`" if record.subset else "")
    splits = ", ".join(str(record.splits[split]) for split in ("train", "validation", "test"))
    return f"| `{name}` | {record.title} | {source} | {splits} | {record.rule} | {record.max_new_tokens} |"


def _templates(name: str, record: Record) -> str:
    option = f"{{options}}: `{record.option}`, one per line. " if "{options}" in record.prompt else ""
    columns = ", ".join(record.columns)
    return f"**{name}** {option}Columns: {columns}.\n\n```text\n{record.prompt}{record.completion}\n```\n"


if __name__ == "__main__":
    main()
