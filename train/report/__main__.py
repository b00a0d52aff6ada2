"""A report on a run, or on several side by side: `python -m train.report runs/quickstart`.

One HTML file with curves, answers before and after, what is steered where, settings and the commands to do it again. It
loads nothing from elsewhere, so it can be sent to a colleague. Runs that have not finished are reported as far as they
have come.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from jaxsteer.io.files import write_text
from jaxsteer.ranges import Natural, check_ranges
from train.cli import run_main
from train.report.page import make_page

NAME = "report.html"


@dataclass(frozen=True)
class ReportConfig:
    """Write a report."""

    runs: Annotated[tuple[str, ...], tyro.conf.Positional]
    """Folders of runs, such as runs/quickstart; several are compared."""
    out: str | None = None
    """The HTML file; by default report.html in the run's folder, or here for several runs."""
    examples: Natural = 50
    """Maximum number of test questions that are shown of each run."""

    def place(self) -> Path:
        """Where the report goes.

        Raises:
            ValueError: no run is given, --examples is negative, or --out cannot be an HTML file.
        """
        if not self.runs:
            raise ValueError("which run? Give its folder: jaxsteer report runs/quickstart")
        check_ranges(self)
        if self.out is None:
            one = Path(self.runs[0])
            return Path(NAME) if len(self.runs) > 1 else (one if one.is_dir() else one.parent) / NAME
        path = Path(self.out)
        if path.suffix.lower() not in (".html", ".htm") or path.is_dir():
            raise ValueError(f"--out {self.out}: the report is one HTML file; give a name that ends in .html")
        if not path.resolve().parent.is_dir():
            raise ValueError(f"--out {self.out}: there is no folder {path.parent}")
        return path


def main() -> None:
    """Write the report and say where it is."""
    config = tyro.cli(ReportConfig, prog="python -m train.report", description=__doc__)
    path = config.place()
    write_text(path, make_page(config.runs, config.examples))
    print(f"report: {path}")


if __name__ == "__main__":
    run_main(main)
