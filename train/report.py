"""What a run prints: its facts at the start, the table and some answers at the end."""

from __future__ import annotations

import sys
from typing import Any

from rich.markup import escape
from rich.table import Table

from train.display.console import get_console, print_facts
from train.evaluation.answers import Decoded, accuracy_of
from train.tasks.scoring import percent

SHOWN = 3
"""Problems whose answers are printed."""


def print_result(result: Any) -> None:
    """The table of a finished run, a few answers before and after, and where everything lies."""
    out = get_console()
    table = Table(title="Result", title_justify="left", show_header=False)
    for name, decoded in (("before", result.before), ("after", result.after)):
        if decoded:
            found = accuracy_of(decoded)
            table.add_row(f"accuracy {name} (95 %)", f"{percent(found)} of {found.total} held-out problems")
    share = 100 * result.trainable / result.total
    table.add_row("trainable parameters", f"{result.trainable:,} ({share:.2f} % of {result.total:,})")
    table.add_row("training time", f"{result.seconds:.0f} s")
    table.add_row("speed", f"{result.tokens_per_second:,.0f} tokens/s")
    table.add_row("peak memory", f"{result.peak_memory / 1e9:.2f} GB")
    out.print(table)

    answers = Table(title="Answers before and after", title_justify="left", show_lines=True)
    for column in ("prompt", "before", "after", "right answer"):
        answers.add_column(column)
    for before, after in _telling(result.before, result.after):
        answers.add_row(*(escape(text) for text in (before.prompt, before.output, after.output, str(before.gold))))
    if answers.row_count:
        out.print(answers)

    run = result.run
    places = {"checkpoints": run.checkpoints, "curves": run.plot, "metrics": run.metrics, "summary": run.summary}
    if run.steering.exists():
        places = {"steering": run.steering, **places}
    print_facts({name: str(path) for name, path in places.items()})
    if run.steering.exists() and result.after:
        out.print("\nAnswer a new problem with it:", highlight=False)
        command = f"  {sys.executable} -m train.generate {run.steering} '{result.example}' --compare"
        out.print(command, markup=False, highlight=False, soft_wrap=True)


def _telling(before: list[Decoded], after: list[Decoded]) -> list[tuple[Decoded, Decoded]]:
    """The first few problems, as they come: a choice would flatter."""
    return list(zip(before, after, strict=True))[:SHOWN]
