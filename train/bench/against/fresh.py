"""Figures of a whole process: memory at its peak, and time from its start to its first step. Ours is `jaxsteer sft`."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, NamedTuple

from train.bench.against.arena import Arena
from train.bench.against.contest import Better, Contest, Part, Side
from train.bench.against.training import RATE, TrainingRow, source_of, work_of
from train.devices.programs import started
from train.peers import Conversation, temporary_folder

STEPS = 3
"""Training steps after which memory is read."""

PATIENCE = 1800.0
"""Seconds in which a process of ours must have done its steps."""


class Progress(NamedTuple):
    """A process that has done some steps: seconds since its start, and its peak memory in bytes."""

    seconds: float
    peak: int


def train_afresh(arena: Arena, row: TrainingRow, steps: int, cache: Path) -> Progress:
    """Start `jaxsteer sft`, and stop it when it has done some steps.

    Args:
        arena: settings, model and data.
        row: what is trained, on which data.
        steps: number of steps to wait for.
        cache: folder for compiled programs and tokenised data, empty or from an earlier run.

    Raises:
        ValueError: it failed, or took too long; the message ends with the last lines that it wrote.
    """
    with temporary_folder("jaxsteer-fresh-") as temporary:
        folder = Path(temporary)
        arena.data[row.data].write(folder / "train.jsonl")
        command = _command(arena, row, folder)
        environment = {**os.environ, "JAXSTEER_CACHE": str(cache)}
        with (folder / "said").open("wb") as said:
            began = time.perf_counter()
            with started(command, "jaxsteer sft", said, None, environment, said) as process:
                seconds = _wait(process, folder, steps, began)
                return Progress(seconds, _peak(process.pid))


def _command(arena: Arena, row: TrainingRow, folder: Path) -> list[str]:
    """The command that trains as the row says, and evaluates nothing."""
    source = source_of(arena, row.data)
    options = {
        "task.train": folder / "train.jsonl",
        "model": arena.launch.folder,
        "batch-size": source.batch_size,
        "sequence-length": source.sequence_length,
        "on-long": "drop",
        "steps": 1000,
        "optim.lr": RATE,
        "dtype": "float32",
        "test-examples": 0,
        "validation-examples": 0,
        "checkpoint-every": 1000,
        "out": folder / "run",
    }
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    return [sys.executable, "-m", "train", "sft", "jsonl", *words, "--plan", *row.plan]


def _wait(process: subprocess.Popen, folder: Path, steps: int, began: float) -> float:
    """Seconds until the run has logged its steps."""
    log = folder / "run" / "metrics.jsonl"
    while time.perf_counter() - began < PATIENCE:
        if log.exists() and log.read_bytes().count(b"\n") >= steps:
            return time.perf_counter() - began
        if process.poll() is not None:
            lines = (folder / "said").read_text(errors="replace").split("\n")
            raise ValueError(f"jaxsteer sft failed: {' | '.join(line for line in lines[-4:] if line)}")
        time.sleep(0.02)
    raise ValueError(f"jaxsteer sft has not done {steps} steps within {PATIENCE:g} seconds, so it was stopped")


def _peak(pid: int) -> int:
    """Peak memory of a running process in bytes."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        raise ValueError("memory of other processes is read from /proc, which this system does not have") from None
    return 1024 * next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM:"))


@dataclass(frozen=True)
class MemoryRow:
    """Peak memory of a fresh process that loads the model and trains for a few steps.

    training  what is trained, on which data
    collate   how the opponent makes batches
    """

    name: str
    title: str
    training: TrainingRow
    collate: str
    group: ClassVar[str] = "memory"
    unit: ClassVar[str] = "GB"
    better: ClassVar[Better] = "lower"

    @contextmanager
    def contest(self, arena: Arena) -> Iterator[Contest]:
        """Both sides, each in a process of its own."""
        work = work_of(arena, self.training.data, STEPS)
        request = work.asked(self.collate)

        def theirs() -> float:
            with arena.peer() as peer:
                self.training.begin(peer, {})
                count = len(peer.ask("batches", **request)["batches"])
                for index in range(min(STEPS, count)):
                    peer.ask("step", collate=self.collate, index=index)
                return peer.ask("memory")["peak"] / 1e9

        with temporary_folder("jaxsteer-cache-") as cache:
            ours = lambda: train_afresh(arena, self.training, STEPS, Path(cache)).peak / 1e9
            yield Contest(
                Side("jaxsteer sft", [Part(ours, None)]),
                [Side(self.training.side_name(request), [Part(theirs, None)])],
                limited_by="saved activations",
            )


@dataclass(frozen=True)
class StartRow:
    """Seconds from the start of a process to its first step: imports, tokenising the data, loading, compiling, a step.

    training  what is trained, on which data
    warm      a run before it has filled our cache of compiled programs and tokenised data
    """

    name: str
    title: str
    training: TrainingRow
    warm: bool
    group: ClassVar[str] = "start"
    unit: ClassVar[str] = "s"
    better: ClassVar[Better] = "lower"

    @contextmanager
    def contest(self, arena: Arena) -> Iterator[Contest]:
        """Both sides, each in a process of its own."""
        with temporary_folder("jaxsteer-cache-") as folder:
            data, kept = Path(folder) / "train.jsonl", Path(folder) / "kept"
            arena.data[self.training.data].write(data)
            if self.warm:
                train_afresh(arena, self.training, 1, kept)

            def ours() -> float:
                with temporary_folder("jaxsteer-cache-") as empty:
                    return train_afresh(arena, self.training, 1, kept if self.warm else Path(empty)).seconds

            def theirs() -> float:
                began = time.perf_counter()
                with arena.peer() as peer:
                    self._first_step(arena, peer, data)
                    return time.perf_counter() - began

            yield Contest(
                Side("jaxsteer sft", [Part(ours, None)]),
                [Side(self.training.opponent, [Part(theirs, None)])],
                limited_by="imports and the step" if self.warm else "compilation",
            )

    def _first_step(self, arena: Arena, peer: Conversation, data: Path) -> None:
        """The peer reads the same file, and trains a step on its first examples."""
        self.training.begin(peer, {})
        peer.ask("encode", path=str(data), rows=arena.config.batch_size, length=arena.config.sequence_length)
        peer.ask("step", collate="padded", index=0)
