"""What was measured, for a person: the list of stages, and the tables in Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.table import Table

from train.bench.accelerator.records import Record, Stage, Store, latest
from train.bench.accelerator.settings import AcceleratorBench
from train.bench.accelerator.stages import STAGES
from train.bench.figures import shown


def listed(config: AcceleratorBench, store: Store) -> Table:
    """Every stage: what it measures, what it needs, and how far it is, on any device and with any code."""
    table = Table("stage", "measures", "needs", "rows", "done")
    for stage in STAGES:
        rows = stage.rows(config, store.records)
        needs = dict.fromkeys(need.words for row in rows for need in row.needs)
        names = {row.name for row in rows}
        outcomes = [r.outcome for r in latest(store.records) if r.stage == stage.name and r.row in names]
        counts = {outcome: outcomes.count(outcome) for outcome in dict.fromkeys(outcomes)}
        done = ", ".join(f"{count} {outcome}" for outcome, count in counts.items())
        table.add_row(stage.name, stage.about, ", ".join(needs), str(len(rows)), done or "nothing yet")
    return table


def markdown(records: Sequence[Record]) -> str:
    """A section for each stage that has records, with a table for each device."""
    parts = []
    for stage in STAGES:
        of_stage = [record for record in latest(records) if record.stage == stage.name]
        for device in dict.fromkeys(record.device.key for record in of_stage):
            on_device = [record for record in of_stage if record.device.key == device]
            parts.append(_section(stage, device, on_device))
    return "\n\n".join(parts) + "\n"


def _section(stage: Stage, device: str, records: Sequence[Record]) -> str:
    """The table of a stage on a device, what did not work, and what follows."""
    measured = [record for record in records if record.outcome == "measured"]
    lines = [f"### {stage.name} ({device})", "", f"{stage.about[0].upper()}{stage.about[1:]}."]
    if measured:
        columns = list(dict.fromkeys(name for record in measured for name in record.figures))
        lines += ["", f"| | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
        for record in measured:
            cells = [_cell(record.figures.get(name, "")) for name in columns]
            lines.append(f"| {record.row} | {' | '.join(cells)} |")
    others = [record for record in records if record.outcome != "measured"]
    lines += ["", *(f"- {record.row}: {record.outcome} ({_cell(record.message)})" for record in others)] * bool(others)
    lines += ["", *(f"- {line}" for line in found)] if (found := stage.summary(measured)) else []
    made = sorted({f"{record.commit or 'no commit'}, sources {record.code}, {record.time[:10]}" for record in records})
    return "\n".join([*lines, "", f"Measured with {'; '.join(made)}."])


def _cell(value: Any) -> str:
    """A figure in a cell of a Markdown table."""
    return shown(value).replace("|", "\\|").replace("\n", " ")
