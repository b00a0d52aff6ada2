"""Measures the rows of the stages in order, as far as the time goes, and keeps each result at once."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace

import jax

from jaxsteer.plans import did_you_mean
from train.bench.accelerator.records import (
    ATTEMPTS,
    Context,
    Device,
    Record,
    Row,
    Stage,
    Store,
    blank,
)
from train.bench.accelerator.settings import AcceleratorBench
from train.bench.accelerator.stages import STAGES
from train.bench.accelerator.worker import Attempt, attempt, attempt_apart, device_apart, find_device
from train.bench.provenance import commit
from train.devices import interrupts
from train.display.console import say
from train.run.folder import now

MARGIN = 15.0
"""Seconds of the time limit that are left for starting, ending and writing."""


def chosen(names: str) -> list[Stage]:
    """The stages with these names, separated by commas; all if there are none.

    Raises:
        ValueError: there is no stage of that name.
    """
    known = {stage.name: stage for stage in STAGES}
    wanted = [name.strip() for name in names.split(",") if name.strip()]
    for name in wanted:
        if name not in known:
            hint = did_you_mean(name, known)
            raise ValueError(f"--stage: there is no stage {name!r}{hint}; the stages are {', '.join(known)}")
    return [stage for stage in STAGES if not wanted or stage.name in wanted]


def is_done(record: Record | None, row: Row, *, retry: bool) -> bool:
    """Whether a row need not be measured (again)."""
    if record is None or record.outcome == "not here":
        return False
    if record.outcome == "failed":
        return not retry
    return record.outcome != "stopped" or (record.attempts >= ATTEMPTS and not row.resumes)


def unmet(row: Row, device: Device, config: AcceleratorBench) -> str:
    """What a row needs and is not there, as a sentence; "" if all is."""
    missing = [need.words for need in row.needs if not need.met(device, config)]
    if row.environment and not config.isolate:
        missing.append("a process of its own")
    return f"needs {' and '.join(missing)}; this is {device.kind}" if missing else ""


def run(config: AcceleratorBench, clock: Callable[[], float] = time.monotonic) -> Store:
    """Measure what is not measured yet.

    Args:
        config: what to measure, and how long.
        clock: returns the time in seconds; replaced in tests.

    Raises:
        ValueError: an unknown stage, or a file of results that is none.
    """
    began = clock()
    stages, store = chosen(config.stage), Store(config.json)
    if config.isolate:  # this process must not take the device's memory
        jax.config.update("jax_platforms", "cpu")
    device = device_apart() if config.isolate else find_device()
    say(f"{device.kind}, {', '.join(f'{name} {version}' for name, version in device.versions.items())}", stderr=False)
    session = _Session(config, store, device, clock, began)
    for stage in stages:
        if not session.finish(stage):
            say(f"The time limit is near: give the same command again to go on. Results: {store.path}", stderr=False)
            return store
    say(f"All done. Results: {store.path}", stderr=False)
    return store


class _Session:
    """One call of the command."""

    def __init__(
        self, config: AcceleratorBench, store: Store, device: Device, clock: Callable[[], float], began: float
    ) -> None:
        self._config, self._store, self._device = config, store, device
        self._clock, self._began, self._begun = clock, began, 0

    def finish(self, stage: Stage) -> bool:
        """Measure the rows of a stage that are not done; False if the time did not allow all of them."""
        rows, all_done = stage.rows(self._config, self._store.records), True
        for number, row in enumerate(rows, 1):
            interrupts.safe_point(f"Finished rows are in {self._store.path}.")
            record = self._store.of(stage, row, self._device)
            if is_done(record, row, retry=self._config.retry):
                continue
            title = f"{stage.name} {number}/{len(rows)}  {row.name}"
            if self._set_aside(stage, row, rows):
                continue
            if not self._fits(row):
                all_done = False
                continue
            rest = sum(each.seconds for each in rows[number - 1 :])
            say(f"{title}: about {row.seconds:.0f} s, at most {rest:.0f} s to the end of the stage", stderr=False)
            self._begun += 1
            self._keep(stage, row, self._attempt(stage, row), 1 + (record.attempts if record else 0))
            ended = self._store.of(stage, row, self._device)
            assert ended is not None
            all_done &= is_done(ended, row, retry=False)
            say(f"{title}: {_shown(ended)}", stderr=False)
        return all_done

    def _set_aside(self, stage: Stage, row: Row, rows: Sequence[Row]) -> bool:
        """Whether a row cannot be measured, which is recorded."""
        if reason := unmet(row, self._device, self._config):
            self._keep(stage, row, Attempt("not here", reason, {}, 0.0), 0)
            return True
        for smaller in rows:
            record = self._store.of(stage, smaller, self._device)
            if not row.family or smaller.family != row.family or smaller.size > row.size or record is None:
                continue
            if record.outcome == "out of memory":
                self._keep(stage, row, Attempt("out of memory", f"not tried: {smaller.name} did", {}, 0.0), 0)
                return True
        return False

    def _seconds_left(self) -> float | None:
        limit = self._config.time_limit
        return None if limit is None else limit - MARGIN - (self._clock() - self._began)

    def _fits(self, row: Row) -> bool:
        """Whether a row is expected to end in time. The first of a call is tried whatever is expected."""
        left = self._seconds_left()
        return left is None or left >= row.seconds or (left > 0 and not self._begun)

    def _attempt(self, stage: Stage, row: Row) -> Attempt:
        context = Context(self._config, self._device, self._store.records, self._seconds_left())
        if row.here or not self._config.isolate:
            return attempt(row, context)
        return attempt_apart(stage.name, row, context)

    def _keep(self, stage: Stage, row: Row, done: Attempt, attempts: int) -> None:
        record = replace(
            blank(stage, row, self._device),
            **done._asdict(),
            attempts=attempts,
            commit=commit(),
            time=now(),
        )
        self._store.add(record)


def _shown(record: Record) -> str:
    """A record in a line."""
    if record.outcome != "measured":
        return f"{record.outcome} ({record.message})"
    figures = (f"{name} {value:.4g}" for name, value in record.figures.items() if isinstance(value, int | float))
    return f"{', '.join(list(figures)[:5])}; {record.seconds:.0f} s"
