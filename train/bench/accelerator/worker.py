"""One row, measured in this process or in one of its own: `python -m train.bench.accelerator.worker`, not to be called
by hand. It reads a request in JSON and prints, as its last line, how the row ended.
"""

from __future__ import annotations

import json
import os
import platform
import sys
import time
import traceback
from collections.abc import Mapping
from dataclasses import asdict
from functools import cache
from importlib.metadata import distributions
from typing import Any, NamedTuple

import jax

from jaxsteer.io.files import Json, parse_json
from jaxsteer.sharding import current_platform
from train.bench.accelerator.records import Context, Device, Figures, Outcome, OutOfMemory, Record, Row
from train.bench.accelerator.settings import AcceleratorBench
from train.bench.accelerator.stages import STAGES
from train.bench.provenance import ROOT
from train.devices.machine import enable_compilation_cache
from train.devices.programs import TookTooLong, run_program
from train.plain import from_plain

_PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy", "torch", "transformers", "peft", "nvidia-cudnn", "libtpu")
_FULL = ("RESOURCE_EXHAUSTED", "out of memory", "OUT_OF_MEMORY")
_NAME, _LINES = "a measuring process", 4
"""What messages call the process of a row, and how many of its last lines they tell."""
_MEMORY = {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.92"}
"""A row has the device to itself; JAX would take three quarters of its memory."""


class Attempt(NamedTuple):
    """How a row ended, why it was not measured, what it measured, and the seconds that it took."""

    outcome: Outcome
    message: str
    figures: Figures
    seconds: float


def attempt(row: Row, context: Context) -> Attempt:
    """Measure a row in this process; what goes wrong is a result too."""
    began = time.perf_counter()
    ended: tuple[Outcome, str, Figures]
    try:
        ended = "measured", "", row.measure(context)
    except TookTooLong as error:
        ended = "stopped", str(error), {}
    except Exception as error:
        text = f"{type(error).__name__}: {error}"
        full = isinstance(error, OutOfMemory) or _is_full(text)
        at = traceback.extract_tb(error.__traceback__)[-1]
        ended = (
            ("out of memory", _short(str(error)), {})
            if full
            else ("failed", f"{_short(text)} ({at.filename.rpartition('/')[2]}:{at.lineno})", {})
        )
    outcome, message, figures = ended
    return Attempt(outcome, message, figures, time.perf_counter() - began)


def _is_full(text: str) -> bool:
    """Whether a message tells of memory that ran out."""
    return any(words in text for words in _FULL)


def _short(text: str) -> str:
    """The first lines of a message; XLA's can list every allocation."""
    return " | ".join(line.strip() for line in text.strip().splitlines()[:4] if line.strip())[:600]


def attempt_apart(stage: str, row: Row, context: Context) -> Attempt:
    """Measure a row in a process of its own, which is ended when the time is up."""
    request = {
        "config": asdict(context.config),
        "stage": stage,
        "row": row.name,
        "device": asdict(context.device),
        "records": [asdict(record) for record in context.records],
    }
    began = time.perf_counter()
    try:
        said = _ask(request, row.environment, context.seconds_left)
    except TookTooLong:
        return Attempt("stopped", "the time limit came first", {}, time.perf_counter() - began)
    except ValueError as error:  # it crashed: a kernel or a driver, not an exception
        outcome: Outcome = "out of memory" if _is_full(str(error)) else "failed"
        return Attempt(outcome, _short(str(error)), {}, time.perf_counter() - began)
    return Attempt(said["outcome"], said["message"], said["figures"], time.perf_counter() - began)


def device_apart() -> Device:
    """The device, looked up in a process of its own: one that has looked keeps its memory."""
    return from_plain(Device, _ask({}, {}, None), "the device")


def _ask(request: Json, environment: Mapping[str, str], timeout: float | None) -> Json:
    """What a worker answers, of the last line that it prints."""
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    done = run_program(
        [sys.executable, "-m", "train.bench.accelerator.worker"],
        json.dumps(request),
        _NAME,
        timeout,
        folder=None,
        environment={**_MEMORY, **os.environ, "PYTHONPATH": path, **environment},
    )
    if done.status:
        said = [line for line in done.complaint.strip().splitlines() if line.strip()][-_LINES:]
        raise ValueError(f"{_NAME} ended with status {done.status}: {' | '.join(said)}")
    return parse_json(done.printed.strip().rpartition("\n")[2], _NAME)


@cache
def find_device() -> Device:
    """The default device of this process."""
    device = jax.devices()[0]
    stats: Mapping[str, Any] = device.memory_stats() or {}
    installed = {each.name.lower(): each.version for each in distributions()}
    wanted = {name: version for name, version in installed.items() if name in _PACKAGES or name.startswith("jax-cuda")}
    wanted |= {name: version for name, version in installed.items() if name.startswith("nvidia-cudnn")}
    wanted |= {"python": platform.python_version()}
    if runs_on := _short(device.client.platform_version):
        wanted |= {"runtime": runs_on}
    memory = int(stats.get("bytes_limit", 0))
    return Device(current_platform(), device.device_kind, memory, dict(sorted(wanted.items())))


def _answer(request: Mapping[str, Json]) -> Json:
    """The device, or how the row of a request ended."""
    enable_compilation_cache()
    if not request:
        return asdict(find_device())
    config = from_plain(AcceleratorBench, request["config"], "the request")
    records = [from_plain(Record, data, "the request") for data in request["records"]]
    stage = next(stage for stage in STAGES if stage.name == request["stage"])
    row = next(row for row in stage.rows(config, records) if row.name == request["row"])
    return attempt(row, Context(config, from_plain(Device, request["device"], "the request"), records))._asdict()


if __name__ == "__main__":
    print(json.dumps(_answer(json.load(sys.stdin))))
