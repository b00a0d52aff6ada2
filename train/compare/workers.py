"""Worker processes of a comparison: each makes all runs of one method after another, on its share of the CPU's cores.

One process with many threads leaves cores idle between the small matrix products of a small model; several processes
with few threads do not.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import cast

import jax

from train.compare.config import CompareConfig, Entry
from train.compare.runs import Comparison
from train.devices.machine import enable_compilation_cache
from train.run.training import load_base_model


@dataclass(frozen=True)
class _Failure:
    """An error in a worker; `expected` ones are sentences for the user."""

    text: str
    expected: bool


def cores_of_workers(workers: int) -> list[set[int]]:
    """The cores of each worker: all that this process may use, dealt out in turn; empty sets where it cannot tell.

    Raises:
        ValueError: workers on an accelerator, or more than there are cores.
    """
    if jax.default_backend() != "cpu":
        raise ValueError(
            f"--workers {workers}: workers share the cores of a CPU, and this is a {jax.default_backend()}; leave it "
            "at 1: the runs of a method already train together there"
        )
    can_pin = hasattr(os, "sched_setaffinity")  # Linux
    cores = sorted(os.sched_getaffinity(0)) if can_pin else list(range(os.cpu_count() or 1))
    if workers > len(cores):
        raise ValueError(f"--workers {workers}: more than the CPU cores that this process may use ({len(cores)})")
    return [set(cores[worker::workers]) if can_pin else set() for worker in range(workers)]


@dataclass(frozen=True)
class _Worker:
    """A process, and the pipe to it: methods go there; steps done, names of finished methods and errors come back."""

    process: BaseProcess
    pipe: Connection

    def give(self, entry: Entry | None) -> None:
        """Have it make the runs of a method, or end."""
        with suppress(ConnectionError):  # that it has ended is found by `receive`
            self.pipe.send(entry)

    def receive(self) -> int | str:
        """The number of steps done since the last time, or the name of a method that has finished.

        Raises:
            ValueError: an error that the user can fix, or the system ended the process.
            RuntimeError: a bug, with the worker's traceback.
        """
        try:
            said = self.pipe.recv()
        except (EOFError, ConnectionError):
            self.process.join()
            raise ValueError(
                f"a worker ended with status {self.process.exitcode}, perhaps for want of memory; finished runs are "
                "kept: the same command with fewer --workers continues"
            ) from None
        if isinstance(said, _Failure):
            raise (ValueError if said.expected else RuntimeError)(said.text)
        return cast("int | str", said)


@contextmanager
def working(config: CompareConfig, advance: Callable[[int], None]) -> Iterator[Callable[[Entry], None]]:
    """Let worker processes make the runs of all methods, in the order of the config, while the block runs.

    Args:
        config: the comparison, with the number of steps filled in; with one worker, there are no processes.
        advance: called with the number of training steps done since the last call, over all workers.

    Yields:
        A function that returns when all runs of a method have been made, or are to be made by this process.

    Raises:
        ValueError: more workers than cores, or workers on an accelerator; from the function, an error of a worker.
    """
    if config.workers == 1:
        yield lambda entry: None
        return
    shares = cores_of_workers(config.workers)[: len(config.chosen)]
    entries = iter(config.chosen)
    workers: list[_Worker] = []
    busy: list[_Worker] = []
    finished: set[str] = set()

    def until_finished(entry: Entry) -> None:
        while entry.name not in finished:
            ready = wait([worker.pipe for worker in busy])
            for worker in [each for each in busy if each.pipe in ready]:
                match worker.receive():
                    case int() as steps:
                        advance(steps)
                    case name:
                        finished.add(name)
                        following = next(entries, None)
                        worker.give(following)
                        if following is None:
                            busy.remove(worker)

    try:
        for cores in shares:
            workers.append(_start(config, cores))
            workers[-1].give(next(entries))
        busy += workers
        yield until_finished
    finally:
        for worker in workers:
            worker.process.terminate()  # harmless where it has ended; a run that has not finished is made again


def _start(config: CompareConfig, cores: set[int]) -> _Worker:
    """Start a worker.

    Raises:
        ValueError: the settings cannot be sent to it.
    """
    context = multiprocessing.get_context("spawn")  # JAX does not survive a fork
    ours, theirs = context.Pipe()
    process = context.Process(target=_work, args=(config, cores, theirs))
    try:
        process.start()
    except (AttributeError, TypeError, pickle.PicklingError) as error:
        raise ValueError(f"--workers: the settings cannot be sent to another process ({error}); use 1") from None
    theirs.close()  # so that its end is noticed here
    return _Worker(process, ours)


def _work(config: CompareConfig, cores: set[int], pipe: Connection) -> None:
    """Make the runs of methods until there is no other: what a worker process does."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C is the parent's to explain
    threading.Thread(target=_end_with_parent, daemon=True).start()
    if cores:
        os.sched_setaffinity(0, cores)  # JAX makes its threads later, one for each core
    sys.stdout = sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115  # the parent shows progress
    try:
        enable_compilation_cache()
        comparison = Comparison(config, load_base_model(config.base), pipe.send)
        while (entry := pipe.recv()) is not None:
            comparison.runs_of(entry, lambda note: None)
            pipe.send(entry.name)
    except (ValueError, OSError) as error:
        pipe.send(_Failure(str(error), expected=True))
    except Exception:
        pipe.send(_Failure(f"in a worker:\n{traceback.format_exc()}", expected=False))


def _end_with_parent() -> None:
    """End this process when its parent has, however that ended."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)
