"""Write the list of named tasks into its page: `python -m train.tasks`."""

from __future__ import annotations

from pathlib import Path

from train.tasks.table_of_tasks import documentation

PAGE = Path("docs/tasks.md")


def main() -> None:
    """Replace what stands between the marks."""
    before, _, after = PAGE.read_text("utf-8").split("<!-- generated -->")
    mark = "<!-- generated -->"
    PAGE.write_text(f"{before}{mark}\n\n{documentation().strip()}\n\n{mark}{after}", "utf-8")


if __name__ == "__main__":
    main()
