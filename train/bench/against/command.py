"""`jaxsteer bench against`: measure the rows that are asked for, and save each as soon as it is finished."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxsteer.io.files import read_json, write_json
from train.bench.against.arena import AgainstBench, Arena, make_arena, read_data
from train.bench.against.contest import hold, parts_of
from train.bench.against.page import table, write_into
from train.bench.against.rows import Row, chosen
from train.bench.against.texts import Data
from train.bench.provenance import code_digest, commit
from train.devices.machine import machine_facts, versions
from train.display.console import progress, say
from train.peers import interpreter_of, temporary_folder
from train.run.folder import now

TUNABLES = "GLIBC_TUNABLES"


def bench_against(config: AgainstBench) -> None:
    """Measure, or print the table of what was measured.

    Raises:
        ValueError: settings or files that do not fit, a peer that failed, sides that do not do the same work.
    """
    if config.table:
        figures = read_json(config.table)
        write_into(config.into, figures) if config.into else print(table(figures))
        return
    rows = chosen(config.rows)
    interpreter_of("bench", config.python)
    path = Path(config.json)
    if not path.parent.is_dir():
        raise ValueError(f"--json {path}: the folder {path.parent} does not exist")
    figures, data = read_json(path) if path.exists() else {}, read_data(config)
    keys = {row.name: {"code": code_digest(), "settings": _settings(config, data, row)} for row in rows}
    due = [row for row in rows if config.again or not _is_measured(figures, row, keys[row.name])]
    if kept := [row.name for row in rows if row not in due]:
        say(f"measured already, with these settings and this code: {', '.join(kept)}; --again measures them once more")
    if due:
        with temporary_folder("jaxsteer-against-") as temporary:
            arena = make_arena(config, data, Path(temporary))
            for number, row in enumerate(due, 1):
                result = _measure(arena, row, f"{number} of {len(due)}  {row.name}")
                figures = _with_row(figures, row.name, keys[row.name] | result) | {"machine": machine_facts()}
                write_json(path, figures)
    print(table(figures))


def _is_measured(figures: Mapping[str, Any], row: Row, key: Mapping[str, Any]) -> bool:
    """Whether a file has the figures of a row, of the same code and settings."""
    found = figures.get("rows", {}).get(row.name, {})
    return all(found.get(name) == value for name, value in key.items())


def _measure(arena: Arena, row: Row, heading: str) -> dict[str, Any]:
    """One row, as JSON."""
    say(f"{heading}: preparing and comparing both sides ...")
    began, load = time.perf_counter(), os.getloadavg()
    with row.contest(arena) as contest:
        total, done = parts_of(contest, arena.config.pairs), 0
        with progress(total, heading) as bar:

            def advance() -> None:
                nonlocal done
                done += 1
                bar.update(done)

            result = hold(contest, arena.config.pairs, row.better, advance)
    ratio = result["ratio"]
    say(f"{heading}: {ratio['median']:.2f} ({ratio['lowest']:.2f} to {ratio['highest']:.2f}) times {row.unit}")
    about = {"title": row.title, "group": row.group, "unit": row.unit, "better": row.better}
    return (
        about
        | result
        | {
            "pairs": arena.config.pairs,
            "commit": commit(),
            "versions": versions() | arena.told,
            "load_average": [load, os.getloadavg()],
            "seconds": time.perf_counter() - began,
            "date": now(),
        }
    )


def _with_row(saved: Mapping[str, Any], name: str, row: Mapping[str, Any]) -> dict[str, Any]:
    """The saved figures with one more row, in the table's order."""
    rows = {**saved.get("rows", {}), name: row}
    return {**saved, "rows": {each.name: rows[each.name] for each in chosen(()) if each.name in rows}}


def _settings(config: AgainstBench, data: Mapping[str, Data], row: Row) -> dict[str, Any]:
    """What the figure of a row depends on, besides code and machine."""
    origins = {kind: each.origin for kind, each in data.items()}
    return config.defining | {"row": repr(row), "data": origins, TUNABLES: os.environ.get(TUNABLES, "")}
