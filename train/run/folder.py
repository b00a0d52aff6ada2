"""The folder of one run: where its files are, and the refusal to mix two runs."""

from __future__ import annotations

import json
import os
import platform
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from jaxsteer.io import files
from jaxsteer.io.files import write_json
from train.devices import interrupts
from train.devices.processes import is_first
from train.run.changes import Change, changes_of, covers, listed, same
from train.run.inputs import changed_data, check_inputs, check_model
from train.run.metrics import read_metrics

LOCK, OWNER = ".lock", ".lock.json"
"""The lock of a run's folder, and the file that says who holds it."""

STARTED = (
    "config.json",
    "inputs.json",
    "starts.jsonl",
    "metrics.jsonl",
    "answers_during.jsonl",
    "report.html",
    "checkpoints",
    "tensorboard",
    "wandb",
    "wandb_id",
)
"""What may be there before a run's first step, besides answers of the pretrained model."""


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
    def inputs(self) -> Path:
        """What the run reads, JSON; see `train.run.inputs`."""
        return self.folder / "inputs.json"

    @property
    def starts(self) -> Path:
        """One JSON line for each start; see `train.run.starts`."""
        return self.folder / "starts.jsonl"

    @property
    def history(self) -> Path:
        """One JSON line for each time that settings or data were changed on purpose."""
        return self.folder / "history.jsonl"

    @property
    def begun(self) -> bool:
        """Whether the folder holds anything that starting over would lose: a step, or what no start writes."""
        if set(_entries(self.folder)) - {*STARTED, self.answers_before.name, _unfinished(self.answers_before).name}:
            return True
        saved = self.checkpoints.is_dir() and any(each.name.isdecimal() for each in self.checkpoints.iterdir())
        return saved or (self.metrics.exists() and _has_step(self.metrics))

    @property
    def answered(self) -> bool:
        """Whether it holds answers of the pretrained model, finished or not."""
        journal = _unfinished(self.answers_before)
        return self.answers_before.exists() or (journal.exists() and journal.read_bytes().count(b"\n") > 1)

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


@dataclass(frozen=True)
class Changes:
    """What may differ when a run is resumed.

    settings  names of settings that can change at all; "optim" stands for all of optim
    extend    whether they may change now
    new_data  whether the data may
    """

    settings: tuple[str, ...] = ()
    extend: bool = False
    new_data: bool = False


NONE = Changes()

DATA_FILES = ("task.train", "task.validation", "task.test", "task.data")
"""Settings that say where the data is; new data may be in other files."""


def open_run(
    folder: str | Path,
    config: Mapping[str, Any],
    *,
    resume: bool,
    inputs: Mapping[str, Any] | None = None,
    changes: Changes = NONE,
) -> RunFolder:
    """Start a run in a new or empty folder, or resume the run that is there.

    With several processes on one file system, only process 0 calls this. A run that has not done a step is started
    over. Settings and inputs that change on purpose are noted in history.jsonl.

    Args:
        folder: the run's folder; created with its parents.
        config: the settings, JSON values. A run can only be resumed with the settings it was started with.
        resume: resume the run in the folder.
        inputs: what the run reads, see `train.run.inputs`. A run can only be resumed with the same.
        changes: exceptions to both.

    Raises:
        ValueError: as `check_run`, or other inputs.
    """
    run = check_run(folder, config, resume=resume, changes=changes)
    settings, inputs = _as_json(config, run.folder), _as_json(inputs or {}, run.folder)
    changed: list[Change] = []
    if run.config.exists() and resume:
        before = read_inputs(run)
        if not changes.new_data:
            check_inputs(run.folder, before, inputs, optional=bool(changes.settings))
        changed = changes_of(files.read_json(run.config), settings)
        if changed_data(before, inputs):
            changed += changes_of({"data": before}, {"data": inputs})
        if run.inputs.exists() and not changed and inputs.keys() <= before.keys():
            return run
    else:
        _clear(run, keep_answers=run.config.exists() and same(files.read_json(run.config), settings))
    run.folder.mkdir(parents=True, exist_ok=True)
    if changed:
        line = {"time": now(), "steps": steps_done(run), "changed": {name: [old, new] for name, old, new in changed}}
        with run.history.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
    if inputs:
        write_json(run.inputs, (read_inputs(run) if resume else {}) | inputs)
    write_json(run.config, settings)
    return run


def check_run(folder: str | Path, config: Mapping[str, Any], *, resume: bool, changes: Changes = NONE) -> RunFolder:
    """Refuse what `open_run` would refuse because of the settings, without writing anything.

    Raises:
        ValueError: the folder holds another run, or this one and `resume` is not set, or files that are not a run; or
            there is nothing to resume; or the config is not JSON.
    """
    run = RunFolder(Path(folder))
    settings = _as_json(config, run.folder)
    _refuse_file(run.folder)
    if not run.config.exists():
        if resume:
            raise ValueError(f"{run.folder}: no run to resume (no config.json); leave out --resume to start one")
        if found := _entries(run.folder):
            raise ValueError(f"{run.folder}: neither empty nor a run (holds {', '.join(found[:3])}); use another --out")
        return run
    if not resume and not run.begun:
        return run
    before = files.read_json(run.config)
    if unknown := sorted(before.keys() - settings.keys()):
        raise ValueError(
            f"{run.folder}: holds a run of another version of jaxsteer, with settings that this one does not have "
            f"({', '.join(unknown)}). Finish it with that version, or use another --out"
        )
    differing = changes_of(before, settings)
    if changes.new_data:
        differing = [change for change in differing if not covers(DATA_FILES, change.name)]
    if differing:
        fixed = [change for change in differing if not covers(changes.settings, change.name)]
        if fixed and changes.extend:
            raise ValueError(
                f"{run.folder}: {listed(fixed)}. That cannot change in the course of a run; --extend can change "
                f"{', '.join(changes.settings)}. Use another --out"
            )
        if not changes.extend:
            way = "" if fixed or not changes.settings else " --resume --extend to continue with the new ones,"
            raise ValueError(
                f"{run.folder}: holds a run with other settings: {listed(differing)}. Use the same settings,{way} or "
                "another --out"
            )
    if not resume:
        raise ValueError(f"{run.folder}: holds this run already; use --resume to continue it, or another --out")
    return run


@contextmanager
def starting(run: RunFolder) -> Iterator[None]:
    """While the block runs, a failure before the run's first step removes what the start has written.

    Answers of the pretrained model are kept, and the config with them: they may have taken an hour.
    """

    def undo() -> None:
        if is_first() and not run.begun and not run.answered:
            _clear(run, keep_answers=False)
            run.config.unlink(missing_ok=True)
            run.inputs.unlink(missing_ok=True)

    try:
        with interrupts.undoing(undo):
            yield
    except BaseException:
        undo()
        raise


def _has_step(metrics: Path) -> bool:
    """Whether there is a whole line besides that of step 0, an evaluation of the pretrained model."""
    with metrics.open("rb") as file:
        return any(line.endswith(b"\n") and not line.startswith(b'{"step": 0,') for line in file)


def steps_done(run: RunFolder) -> int:
    """Number of steps that a run has reported."""
    return max((row["step"] for row in read_metrics(run.metrics)), default=0) if run.metrics.exists() else 0


def read_inputs(run: RunFolder) -> dict[str, Any]:
    """What a run reads, as its folder says; {} if it does not say."""
    return files.read_json(run.inputs) if run.inputs.exists() else {}


def note_model(run: RunFolder, digest: str) -> None:
    """Note the base model's weights, or compare them with those that the run was started with; see `check_model`."""
    inputs = read_inputs(run)
    check_model(run.folder, inputs, digest)
    if "model" not in inputs:
        write_json(run.inputs, inputs | {"model": {"sha256": digest}})


def read_history(run: RunFolder) -> list[dict[str, Any]]:
    """The lines of history.jsonl: time, steps done by then, and changed: old and new value by name."""
    lines = run.history.read_text(encoding="utf-8").splitlines() if run.history.exists() else []
    return [files.parse_json(line, f"{run.history}:{number}") for number, line in enumerate(lines, 1)]


def changed_on_purpose(run: RunFolder) -> set[str]:
    """Names of all settings ("optim.lr") and inputs ("data.train.sha256") that were changed in the course of a run."""
    return {name for row in read_history(run) for name in row["changed"]}


def _clear(run: RunFolder, *, keep_answers: bool) -> None:
    """Remove what a start that came to nothing has left, but for config and inputs."""
    journal = () if keep_answers else (_unfinished(run.answers_before),)
    for path in (run.starts, run.metrics, run.answers_during, run.folder / "wandb_id", *journal):
        path.unlink(missing_ok=True)
    for name in ("tensorboard", "wandb"):
        shutil.rmtree(run.folder / name, ignore_errors=True)
    with suppress(OSError):  # it is not empty, or not there
        run.checkpoints.rmdir()


def _unfinished(path: Path) -> Path:
    """The journal of answers that are still being given, see `train.evaluation.journal`."""
    return path.with_name(path.name + ".unfinished")


@contextmanager
def locked(folder: str | Path) -> Iterator[None]:
    """Keep other runs out of a folder while the block runs; creates the folder, and removes it if it stays empty.

    The operating system releases the lock when the process that holds it ends, however it ends. On file systems without
    locks nothing is locked.

    Raises:
        ValueError: another process holds it, or there is a file in its place.
    """
    folder = Path(folder)
    _refuse_file(folder)
    made = [each for each in (folder, *folder.parents) if not each.exists()]
    folder.mkdir(parents=True, exist_ok=True)

    def undo() -> None:
        with suppress(OSError):  # the first one that is not empty
            for each in made:
                each.rmdir()

    try:
        with interrupts.undoing(undo), _lock(folder):
            yield
    finally:
        undo()


@contextmanager
def _lock(folder: Path) -> Iterator[None]:
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

    def undo() -> None:
        owner.unlink(missing_ok=True)
        (folder / LOCK).unlink(missing_ok=True)  # while it is held: who opened it meanwhile sees that it is gone

    try:
        with interrupts.undoing(undo):
            write_json(owner, {"process": os.getpid(), "host": platform.node(), "since": now()})
            yield
    finally:
        undo()
        lock.release()


def now() -> str:
    """The time, in UTC, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def _as_json(values: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Values as they are read back: tuples become lists."""
    try:
        return dict(json.loads(json.dumps(dict(values), allow_nan=False)))
    except (TypeError, ValueError) as error:
        raise ValueError(f"config of {folder}: cannot be written as JSON ({error})") from None


def _refuse_file(folder: Path) -> None:
    """Raise ValueError if a file is where a folder should be."""
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder}: a file, but runs need a folder; use another --out")


def _entries(folder: Path) -> list[str]:
    """Names in the folder, without locks and files that a killed process left half-written."""
    if not folder.exists():
        return []
    names = (entry.name for entry in folder.iterdir())
    ignored = lambda name: name in (LOCK, OWNER, "inputs.json") or (name.startswith(".") and name.endswith(".partial"))
    return sorted(name for name in names if not ignored(name))
