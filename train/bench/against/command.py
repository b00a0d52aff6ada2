"""`jaxsteer bench against`: measure the rows that are asked for, and save each as soon as it is finished."""

from __future__ import annotations

import hashlib
import os
import platform
import subprocess
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jaxsteer.io
from jaxsteer.io.files import read_json, write_json
from train.bench.against.arena import AgainstBench, Arena, make_arena
from train.bench.against.contest import hold, parts_of
from train.bench.against.page import table, write_into
from train.bench.against.rows import Row, chosen
from train.display.console import progress, say
from train.peers import interpreter_of, temporary_folder

ROOT = Path(__file__).resolve().parents[3]
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
    path, rows = Path(config.json), chosen(config.rows)
    interpreter_of("bench", config.python)
    saved = read_json(path) if path.exists() else {}
    if config.json and not path.parent.is_dir():
        raise ValueError(f"--json {path}: the folder {path.parent} does not exist")
    with temporary_folder("jaxsteer-against-") as temporary:
        arena = make_arena(config, Path(temporary))
        commit = _commit()
        for number, row in enumerate(rows, 1):
            key = {"commit": commit, "settings": _settings(arena, row)}
            done = saved.get("rows", {}).get(row.name)
            if done and not config.again and {name: done.get(name) for name in key} == key:
                say(f"{number} of {len(rows)}  {row.name}: measured already; --again measures it once more")
                continue
            result = _measure(arena, row, f"{number} of {len(rows)}  {row.name}")
            saved = _with_row(saved, row.name, key | result) | {"machine": _machine()}
            write_json(path, saved)
    print(table(saved))


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
            "versions": _versions() | arena.told,
            "load_average": [load, os.getloadavg()],
            "seconds": time.perf_counter() - began,
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
        }
    )


def _with_row(saved: Mapping[str, Any], name: str, row: Mapping[str, Any]) -> dict[str, Any]:
    """The saved figures with one more row, in the table's order."""
    rows = {**saved.get("rows", {}), name: row}
    return {**saved, "rows": {each.name: rows[each.name] for each in chosen(()) if each.name in rows}}


def _settings(arena: Arena, row: Row) -> dict[str, Any]:
    """What the figure of a row depends on, besides code and machine."""
    origins = {kind: data.origin for kind, data in arena.data.items()}
    return arena.config.defining | {"row": repr(row), "data": origins, TUNABLES: os.environ.get(TUNABLES, "")}


def _versions() -> dict[str, str]:
    names = ("jax", "jaxlib", "flax", "optax")
    return {"jaxsteer": jaxsteer.__version__, "python": platform.python_version()} | {n: version(n) for n in names}


def _machine() -> dict[str, Any]:
    """What was measured on."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return {
        "processor": names[0] if names else platform.processor(),
        "cores": os.cpu_count(),
        "memory_gb": round(pages / 1e9, 1),
        "system": platform.platform(terse=True),
    }


def _commit() -> str:
    """The commit of this clone, with a hash of what was changed since; the version where it is installed."""
    if not (ROOT / ".git").exists():
        return jaxsteer.__version__
    git = lambda *words: subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    try:
        commit, changes = git("rev-parse", "--short=12", "HEAD").strip(), git("diff", "HEAD")
    except (OSError, subprocess.CalledProcessError):
        return jaxsteer.__version__
    return commit + (f"+{hashlib.sha256(changes.encode()).hexdigest()[:8]}" if changes else "")
