"""The folder of one run: where its files are, and the refusal to mix two runs."""

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
"""The lock of a run's folder, and the file that says who holds it."""


@dataclass(frozen=True)
class RunFolder:
    """Paths of a run's files. `open_run` creates the folder."""

    folder: Path
    """The folder itself."""

    @property
    def config(self) -> Path:
        """Settings of the run, JSON."""
        return self.folder / "config.json"

    @property
    def checkpoints(self) -> Path:
        """Folder of the checkpoints."""
        return self.folder / "checkpoints"

    @property
    def metrics(self) -> Path:
        """One JSON line per step."""
        return self.folder / "metrics.jsonl"

    @property
    def plot(self) -> Path:
        """Training curves, PNG."""
        return self.folder / "training.png"

    @property
    def begun(self) -> bool:
        """Whether the folder holds anything that starting over would lose."""
        return bool(set(_entries(self.folder)) - {self.config.name})

    @property
    def steering(self) -> Path:
        """The trained steering, a portable file."""
        return self.folder / "steering.safetensors"

    @property
    def answers_before(self) -> Path:
        """Test answers of the pretrained model, JSON lines."""
        return self.folder / "answers_before.jsonl"

    @property
    def answers_after(self) -> Path:
        """Test answers of the trained model, JSON lines."""
        return self.folder / "answers_after.jsonl"

    @property
    def answers_during(self) -> Path:
        """Answers to a few validation questions at each evaluation, JSON lines."""
        return self.folder / "answers_during.jsonl"

    @property
    def profile(self) -> Path:
        """Folder of profiler traces."""
        return self.folder / "profile"

    @property
    def summary(self) -> Path:
        """Figures of the finished run, JSON."""
        return self.folder / "summary.json"


def open_run(folder: str | Path, config: Mapping[str, Any], *, resume: bool) -> RunFolder:
    """Start a run in a new or empty folder, or resume the run that is there.

    With several processes on one file system, only process 0 calls this. A folder that holds nothing but a config never
    began to train, and is started over.

    Args:
        folder: the run's folder; created with its parents.
        config: the settings, JSON values. A run can only be resumed with the settings it was started with.
        resume: resume the run in the folder.

    Raises:
        ValueError: the folder holds another run, or this one and `resume` is not set, or files that are not a run; or
            there is nothing to resume; or the config is not JSON.
    """
    run = RunFolder(Path(folder))
    try:
        settings = json.loads(json.dumps(dict(config), allow_nan=False))  # tuples become lists, as on disk
    except (TypeError, ValueError) as error:
        raise ValueError(f"config of {run.folder}: cannot be written as JSON ({error})") from None
    _refuse_file(run.folder)
    if run.config.exists() and not resume and not run.begun:
        write_json(run.config, settings)  # what was there stopped at a bad setting, before its first step
        return run
    if run.config.exists():
        before = files.read_json(run.config)
        if unknown := sorted(before.keys() - settings.keys()):
            raise ValueError(
                f"{run.folder}: holds a run of another version of jaxsteer, with settings that this one does not have "
                f"({', '.join(unknown)}). Finish it with that version, or use another --out"
            )
        if differing := differences(before, settings):
            raise ValueError(
                f"{run.folder}: holds a run with other settings: {'; '.join(differing)}. "
                "Use the same settings, or another --out"
            )
        if not resume:
            raise ValueError(f"{run.folder}: holds this run already; use --resume to continue it, or another --out")
        return run
    if resume:
        raise ValueError(f"{run.folder}: no run to resume (no config.json); leave out --resume to start one")
    if found := _entries(run.folder):
        raise ValueError(f"{run.folder}: neither empty nor a run (holds {', '.join(found[:3])}); use another --out")
    run.folder.mkdir(parents=True, exist_ok=True)
    write_json(run.config, settings)
    return run


@contextmanager
def locked(folder: str | Path) -> Iterator[None]:
    """Keep other runs out of a folder while the block runs; creates the folder.

    The operating system releases the lock when the process that holds it ends, however it ends. On file systems without
    locks nothing is locked.

    Raises:
        ValueError: another process holds it, or there is a file in its place.
    """
    folder = Path(folder)
    _refuse_file(folder)
    folder.mkdir(parents=True, exist_ok=True)
    lock, owner = FileLock(folder / LOCK), folder / OWNER
    try:
        lock.acquire(timeout=0)
    except Timeout:
        info = {}
        with suppress(OSError, ValueError):  # it may be gone by now, or damaged
            info = files.read_json(owner)
        who = f"process {info['process']} on {info['host']}, since {info['since']}" if info else "another process"
        raise ValueError(
            f"{folder}: a run is writing here right now ({who}). Wait for it, stop it, or use another --out"
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


def _refuse_file(folder: Path) -> None:
    """Raise ValueError if a file is where a folder should be."""
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder}: a file, but runs need a folder; use another --out")


def _entries(folder: Path) -> list[str]:
    """Names in the folder, without locks and files that a killed process left half-written."""
    if not folder.exists():
        return []
    names = (entry.name for entry in folder.iterdir())
    ignored = lambda name: name in (LOCK, OWNER) or (name.startswith(".") and name.endswith(".partial"))
    return sorted(name for name in names if not ignored(name))


def differences(there: Mapping[str, Any], here: Mapping[str, Any]) -> list[str]:
    """Each setting that differs, nested names joined by dots: "optim.lr is 0.1 there, 0.2 here"."""
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
