"""Rows to measure, and the records of those that were: one JSON file, written again after each."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeAlias

from jaxsteer.io.files import Json, read_json, write_json
from train.bench.accelerator.settings import AcceleratorBench
from train.bench.provenance import code_digest
from train.plain import from_plain

Outcome = Literal["measured", "out of memory", "not here", "failed", "stopped"]
"""How a row ended. not here: this machine lacks something that it needs; stopped: by the time limit."""

Figures: TypeAlias = dict[str, Json]
"""What a row measured: name, with the unit, -> number or text."""

ATTEMPTS = 2
"""How often a row is begun that the time limit stops."""


class OutOfMemory(Exception):
    """A measurement ran out of memory in a program that is not JAX."""


@dataclass(frozen=True)
class Device:
    """The device that rows are measured on.

    platform  cpu, gpu or tpu
    kind      the vendor's name
    memory    bytes that programs may use; 0 if unknown
    versions  of JAX and what it runs on
    """

    platform: str
    kind: str
    memory: int
    versions: Mapping[str, str]

    @property
    def key(self) -> str:
        """What a row's result depends on."""
        return f"{self.kind}, jax {self.versions.get('jax', '?')}"


class Need(NamedTuple):
    """Something that a row needs of the machine or the settings.

    words  what, as in "needs ..."
    met    whether it is there
    """

    words: str
    met: Callable[[Device, AcceleratorBench], bool]


NVIDIA = Need("an NVIDIA GPU", lambda device, config: device.platform == "gpu")
TPU = Need("a TPU", lambda device, config: device.platform == "tpu")
LARGE = Need("an accelerator, or --small", lambda device, config: config.small or device.platform != "cpu")


@dataclass(frozen=True)
class Context:
    """What a row may know besides its own settings.

    config        of the command
    device        to measure on
    records       what has been measured so far
    seconds_left  until the time limit; None = there is none
    """

    config: AcceleratorBench
    device: Device
    records: Sequence[Record]
    seconds_left: float | None = None


@dataclass(frozen=True)
class Row:
    """One row of a stage's table.

    name         in the table, unique within the stage
    measure      makes its figures
    settings     all that the figures depend on besides code and device, as JSON
    seconds      that it is expected to take on an H100, compilation included: a guess
    needs        what must be there
    family, size a row is left out once a smaller or equal one of its family has run out of memory
    environment  variables of its process
    here         it starts processes of its own, so it needs none around them
    resumes      when it is stopped it goes on where it was, so it may be begun any number of times
    """

    name: str
    measure: Callable[[Context], Figures]
    settings: Mapping[str, Json]
    seconds: float
    needs: tuple[Need, ...] = (LARGE,)
    family: str = ""
    size: int = 0
    environment: Mapping[str, str] = field(default_factory=dict)
    here: bool = False
    resumes: bool = False


@dataclass(frozen=True)
class Stage:
    """A part of the measurements.

    name     as typed
    about    what it measures, a line
    rows     the rows for some settings, those measured so far and a machine
    summary  lines below its table, from its records
    """

    name: str
    about: str
    rows: Callable[[AcceleratorBench, Sequence[Record]], Sequence[Row]]
    summary: Callable[[Sequence[Record]], list[str]] = lambda records: []


@dataclass(frozen=True)
class Record:
    """How one row ended, and what it measured.

    stage, row, settings  what was measured
    device    on what
    code      digest of the sources it was measured with, see `code_digest`
    outcome   how it ended
    message   why it was not measured
    figures   what it measured
    seconds   that it took
    attempts  how often it was begun
    commit    of the clone, if there is one
    time      when, UTC
    """

    stage: str
    row: str
    settings: Mapping[str, Any]
    device: Device
    code: str
    outcome: Outcome
    message: str = ""
    figures: Mapping[str, Any] = field(default_factory=dict)
    seconds: float = 0.0
    attempts: int = 1
    commit: str | None = None
    time: str = ""

    @property
    def key(self) -> tuple[str, ...]:
        """Two records with this key are of the same measurement."""
        return (self.stage, self.row, json.dumps(self.settings, sort_keys=True), self.device.key, self.code)


class Store:
    """The records in a file.

    Raises:
        ValueError: the file is not one of records.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        listed = read_json(self.path).get("records") if self.path.exists() else []
        if not isinstance(listed, list):
            raise ValueError(f"{self.path}: not a file of results (it has no records); name another with --json")
        self.records = [from_plain(Record, data, str(self.path)) for data in listed]

    def of(self, stage: Stage, row: Row, device: Device) -> Record | None:
        """The record of a row on a device, with the code as it is; None if there is none."""
        key = blank(stage, row, device).key
        return next((record for record in self.records if record.key == key), None)

    def add(self, record: Record) -> None:
        """Keep a record, in the place of the one of the same measurement, and write the file."""
        kept = [old for old in self.records if old.key != record.key]
        self.records = [*kept, record]
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_json(self.path, {"records": [asdict(each) for each in self.records]})


def blank(stage: Stage, row: Row, device: Device) -> Record:
    """The record of a row, before it is measured."""
    return Record(stage.name, row.name, json.loads(json.dumps(row.settings)), device, code_digest(), "stopped")


def latest(records: Iterable[Record]) -> list[Record]:
    """The last record of each row on each kind of device, whatever its code and settings, in their order."""
    last = {(record.stage, record.row, record.device.kind): record for record in records}
    return list(last.values())
