"""The folder of one run: which file is where, and the refusal to mix two runs."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from jaxsteer.io import files
from jaxsteer.io.files import write_json

LOCK, OWNER = ".lock", ".lock.json"
"""The lock of a run's folder, and who holds it."""


@dataclass(frozen=True)
class RunFolder:
    """Where the parts of a run lie. Naming a path makes nothing: `open_run` makes the folder."""

    folder: Path
    """The folder itself."""

    @property
    def config(self) -> Path:
        """The settings of the run, JSON."""
        return self.folder / "config.json"

    @property
    def checkpoints(self) -> Path:
        """Folder of the checkpoints."""
        return self.folder / "checkpoints"

    @property
    def metrics(self) -> Path:
        """One JSON line a step."""
        return self.folder / "metrics.jsonl"

    @property
    def plot(self) -> Path:
        """The training curves, PNG."""
        return self.folder / "training.png"

    @property
    def begun(self) -> bool:
        """Whether there is anything that another run could lose."""
        return bool(set(_entries(self.folder)) - {self.config.name})

    @property
    def steering(self) -> Path:
        """The trained steering, a portable file."""
        return self.folder / "steering.safetensors"

    @property
    def profile(self) -> Path:
        """Folder of profiler traces."""
        return self.folder / "profile"

    @property
    def summary(self) -> Path:
        """What came out of the run, JSON."""
        return self.folder / "summary.json"


def open_run(folder: str | Path, config: Mapping[str, Any], *, resume: bool) -> RunFolder:
    """Begin a run in a new or empty folder, or go on with the run that is there.

    With several processes on one file system, process 0 alone calls this; the others name the paths with
    `RunFolder`.

    A folder with nothing but its config never began to train and is begun anew.

    Args:
        folder: of the run; made with its parents.
        config: the settings, JSON values. The folder belongs to them: a run goes on as it began.
        resume: go on with the run in the folder.

    Raises:
        ValueError: the folder holds another run, or this one and `resume` is not set, or files that are no
            run; or there is nothing to resume; or the config is not JSON.
    """
    run = RunFolder(Path(folder))
    try:
        settings = json.loads(json.dumps(dict(config), allow_nan=False))  # tuples become lists, as on disk
    except (TypeError, ValueError) as error:
        raise ValueError(f"config of {run.folder}: cannot be written as JSON ({error})") from None
    if run.folder.exists() and not run.folder.is_dir():
        raise ValueError(f"{run.folder}: a file, need a folder for the run; use another --out")
    if run.config.exists() and not resume and not run.begun:
        write_json(run.config, settings)  # what was there stopped at a bad setting, before its first step
        return run
    if run.config.exists():
        if differing := differences(files.read_json(run.config), settings):
            raise ValueError(
                f"{run.folder}: holds a run with other settings: {'; '.join(differing)}. "
                "Use the same settings, or another --out"
            )
        if not resume:
            raise ValueError(f"{run.folder}: holds this run already; use --resume to go on, or another --out")
        return run
    if resume:
        raise ValueError(f"{run.folder}: no run to resume (no config.json); leave out --resume to begin one")
    if found := _entries(run.folder):
        raise ValueError(f"{run.folder}: not empty and not a run (holds {', '.join(found[:3])}); use another --out")
    run.folder.mkdir(parents=True, exist_ok=True)
    write_json(run.config, settings)
    return run


@contextmanager
def locked(folder: str | Path) -> Iterator[None]:
    """Keep other runs out of a folder for as long as the block runs; makes the folder.

    The lock is the operating system's: it is gone with the process that held it, however that ended. On file systems
    without locks nothing is locked.

    Raises:
        ValueError: another process holds it.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    lock, owner = FileLock(folder / LOCK), folder / OWNER
    try:
        lock.acquire(timeout=0)
    except Timeout:
        said = {}
        with suppress(OSError, ValueError):  # gone or damaged between two looks
            said = files.read_json(owner)
        who = f"process {said['process']} on {said['host']}, since {said['since']}" if said else "another process"
        raise ValueError(
            f"{folder}: a run is writing here at this moment ({who}). Wait for it or stop it, or use another --out"
        ) from None
    except NotImplementedError:
        yield
        return
    try:
        since = datetime.now(UTC).isoformat(timespec="seconds")
        write_json(owner, {"process": os.getpid(), "host": platform.node(), "since": since})
        yield
    finally:
        owner.unlink(missing_ok=True)
        lock.release()


def _entries(folder: Path) -> list[str]:
    """What is in the folder, but for files that a killed process was still writing."""
    if not folder.exists():
        return []
    names = (entry.name for entry in folder.iterdir())
    passing = lambda name: name in (LOCK, OWNER) or (name.startswith(".") and name.endswith(".partial"))
    return sorted(name for name in names if not passing(name))


def differences(there: Mapping[str, Any], here: Mapping[str, Any]) -> list[str]:
    """Each differing setting, nested names joined by dots: 'optim.lr is 0.1 there, 0.2 here'."""
    old, new = _flat(there), _flat(here)

    def show(values: dict[str, Any], name: str) -> str:
        return json.dumps(values[name]) if name in values else "missing"

    return [
        f"{name} is {show(old, name)} there, {show(new, name)} here"
        for name in sorted(old.keys() | new.keys())
        if name not in old or name not in new or not _same(old[name], new[name])
    ]


def _same(a: Any, b: Any) -> bool:
    # 1 and 1.0 are one number, but True is not 1
    return a == b and isinstance(a, bool) == isinstance(b, bool)


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    out: dict[str, Any] = {}
    for name, value in tree.items():
        if isinstance(value, Mapping) and value:
            out |= _flat(value, f"{prefix}{name}.")
        else:
            out[f"{prefix}{name}"] = value
    return out
