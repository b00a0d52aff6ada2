"""The starts of a run: when, with which command, how far it had come, and on what machine; a line each."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from jaxsteer.io.files import parse_json, write_text
from train.devices.machine import device_summary, machine_facts, versions
from train.run.folder import RunFolder, now
from train.run.training import Training

_PACKAGE = Path(__file__).resolve().parents[1]


def note_start(run: RunFolder, training: Training, done: int) -> None:
    """Append a line to starts.jsonl.

    Args:
        run: the run's folder.
        training: the run's model, data and program.
        done: number of steps done before.
    """
    row: dict[str, Any] = {
        "time": now(),
        "done": done,
        "steps": training.steps,
        "command": command(),
        "trainable": training.trainable,
        "parameters": training.total,
        "device": device_summary(),
        "machine": machine_facts(),
        "versions": versions(),
    }
    before = run.starts.read_text(encoding="utf-8") if run.starts.exists() else ""
    write_text(run.starts, before + json.dumps(row) + "\n")


def read_starts(run: RunFolder) -> list[dict[str, Any]]:
    """The lines of starts.jsonl, oldest first; a half-written last line is left out.

    Raises:
        ValueError: a line is not a JSON object.
    """
    lines = run.starts.read_text(encoding="utf-8").split("\n")[:-1] if run.starts.exists() else []
    rows = [parse_json(line, f"{run.starts}:{number}") for number, line in enumerate(lines, 1) if line.strip()]
    if not all(isinstance(row, dict) for row in rows):
        raise ValueError(f"{run.starts}: expected a JSON object in each line")
    return rows


def command() -> list[str] | None:
    """The words of this process's command, `jaxsteer NAME ...`; None if another program trains."""
    program = Path(sys.argv[0]).resolve()
    if _PACKAGE not in program.parents:
        return None
    return ["jaxsteer", program.relative_to(_PACKAGE).parts[0].removesuffix(".py"), *sys.argv[1:]]
