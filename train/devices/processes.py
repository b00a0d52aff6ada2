"""Several processes as one run: joining them, work that process 0 does for all, and values that they share.

Every process runs the same program on its own devices; `jax.distributed` joins them, and arrays are then spread over
the devices of all. Process 0 writes the files of a run, except checkpoints, of which every process writes its part.
"""

from __future__ import annotations

import json
import os
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, TypedDict, TypeVar, cast

import jax
import numpy as np
from jax.experimental import multihost_utils

from jaxsteer.ranges import Count, check_ranges
from jaxsteer.types import PyTree
from train.devices import interrupts
from train.devices.rendezvous import NOTICE_SECONDS, Patience, meet, party_of, split_address

T = TypeVar("T")

HEARTBEAT_SECONDS = 100
"""Longest time without a heartbeat after which a process is considered dead."""


@dataclass(frozen=True)
class DistributedConfig:
    """How the processes of a run on several hosts find each other."""

    join: Literal["auto", "yes", "no"] = "auto"
    """Join other processes. auto: if the options below, JAX_COORDINATOR_ADDRESS, SLURM, Open MPI or a TPU pod on GKE
    indicate several processes; yes: always, as needed on TPU VMs; no: never, each process is a run of its own."""
    coordinator: str | None = None
    """host:port of process 0, if the environment does not give it; default: JAX_COORDINATOR_ADDRESS."""
    processes: int | None = None
    """Number of processes; default: JAX_NUM_PROCESSES."""
    process: int | None = None
    """Index of this process, from 0; default: JAX_PROCESS_ID."""
    timeout: Count = 300
    """Seconds to wait for the other processes at the start. Later, a process without a heartbeat for as long (100 s at
    most) is considered dead and the others stop."""

    def __post_init__(self) -> None:
        """Reject a timeout that no process could meet."""
        check_ranges(self, "--distributed.")


class Coordination(TypedDict, total=False):
    """The arguments of `jax.distributed.initialize` that place this process among the others."""

    coordinator_address: str
    num_processes: int
    process_id: int


def join(config: DistributedConfig, environment: Mapping[str, str] = os.environ) -> None:
    """Join the other processes of this run, if there are any. Call it before anything else that starts JAX.

    Raises:
        ValueError: incomplete settings, or the other processes do not answer.
    """
    if config.join == "no" or jax.distributed.is_initialized():
        return
    coordination = explicit(config, environment)
    if not coordination and config.join == "auto" and not several(environment):
        return
    if len(coordination) == 3:
        address, processes, process = coordination.values()
        meet(party_of(str(address), cast(int, processes), cast(int, process)), Patience(config.timeout))
    heartbeat = min(config.timeout, HEARTBEAT_SECONDS)
    try:
        with _waiting_is_said(config.timeout):
            jax.distributed.initialize(
                **coordination,
                local_device_ids=own_gpus(environment),
                initialization_timeout=config.timeout,
                heartbeat_timeout_seconds=heartbeat,
                shutdown_timeout_seconds=heartbeat,
            )
    except (RuntimeError, ValueError) as error:
        address = coordination.get("coordinator_address", "the coordinator that the environment names")
        raise ValueError(
            f"distributed: this process could not join the others at {address} ({error}). All processes need the same "
            "coordinator and number of processes, and each its own index; --distributed.join no runs this one alone"
        ) from None
    interrupts.joined()


@contextmanager
def _waiting_is_said(timeout: int) -> Iterator[None]:
    """Say after a while that the other processes are waited for, where only JAX knows who they are."""
    text = f"waiting for the other processes of this run, up to {timeout} s (--distributed.timeout)"
    timer = threading.Timer(NOTICE_SECONDS, lambda: print(text, file=sys.stderr, flush=True))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def explicit(config: DistributedConfig, environment: Mapping[str, str]) -> Coordination:
    """What the settings, or the environment's JAX_ variables, say of the processes; {} if they say nothing.

    Raises:
        ValueError: some of the three are given but not all, or one is not a number.
    """

    def number(description: str, setting: int | None, variable: str) -> int | None:
        text = environment.get(variable)
        if setting is not None or text is None:
            return setting
        if not text.isdecimal():
            raise ValueError(f"{variable}: must be a number ({description}), got {text!r}")
        return int(text)

    address = environment.get("JAX_COORDINATOR_ADDRESS") if config.coordinator is None else config.coordinator
    values = {
        "coordinator": address,
        "processes": number("how many processes", config.processes, "JAX_NUM_PROCESSES"),
        "process": number("which of them", config.process, "JAX_PROCESS_ID"),
    }
    missing = [name for name, value in values.items() if value is None]
    if missing and len(missing) < len(values) and not several(environment):
        raise ValueError(
            f"distributed: {', '.join(missing)} missing; give all of coordinator, processes and process (or "
            "JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES, JAX_PROCESS_ID), or none of them"
        )
    if values["coordinator"] is not None:
        split_address(str(values["coordinator"]))
    names = {"coordinator": "coordinator_address", "processes": "num_processes", "process": "process_id"}
    return cast(Coordination, {names[name]: value for name, value in values.items() if value is not None})


def several(environment: Mapping[str, str]) -> bool:
    """Whether the variables of SLURM, Open MPI or a TPU pod indicate more than one process."""
    count = lambda name: int(environment.get(name) or 1)
    slurm = count("SLURM_NTASKS") > 1 and "SLURM_PROCID" in environment and "SLURM_STEP_NODELIST" in environment
    hosts = (environment.get("TPU_PROCESS_ADDRESSES") or environment.get("TPU_WORKER_HOSTNAMES") or "").split(",")
    return slurm or count("OMPI_COMM_WORLD_SIZE") > 1 or len(hosts) > 1 or count("MEGASCALE_NUM_SLICES") > 1


def own_gpus(environment: Mapping[str, str]) -> list[int] | None:
    """Indices of this SLURM task's share of its node's GPUs; None outside SLURM.

    By default JAX gives every task one GPU, which leaves the others idle if a node has fewer tasks than GPUs.
    """
    gpus, tasks = environment.get("SLURM_GPUS_ON_NODE", ""), environment.get("SLURM_NTASKS_PER_NODE", "")
    local = environment.get("SLURM_LOCALID", "")
    if not (gpus.isdecimal() and tasks.isdecimal() and local.isdecimal()) or int(gpus) < int(tasks):
        return None
    share = int(gpus) // int(tasks)
    return list(range(int(local) * share, (int(local) + 1) * share))


def is_first() -> bool:
    """Whether this is process 0, which writes files and prints."""
    return jax.process_index() == 0


def on_first(action: Callable[[], T]) -> T:
    """Run `action` on process 0 and return its result, a JSON value, on every process.

    Raises:
        ValueError: on every process, if the action raised ValueError or OSError on process 0.
    """
    if jax.process_count() == 1:
        return action()
    outcome: dict[str, object] = {}
    if is_first():
        try:
            outcome = {"value": action()}
        except (ValueError, OSError) as error:
            outcome = {"error": str(error)}
    text = np.frombuffer(json.dumps(outcome).encode(), np.uint8)
    size = int(multihost_utils.broadcast_one_to_all(np.int32(len(text))))
    received = multihost_utils.broadcast_one_to_all(np.resize(text, size))
    outcome = json.loads(bytes(np.asarray(received, np.uint8)))
    if "error" in outcome:
        raise ValueError(outcome["error"])
    return cast(T, outcome["value"])


def together(read: Callable[[], T]) -> T:
    """Call `read` on every process, and fail on all of them if it fails on one, so that they stay in step.

    Raises:
        ValueError: `read` failed on another process.
    """
    if jax.process_count() == 1:
        return read()
    try:
        value = read()
    except Exception:
        multihost_utils.process_allgather(np.asarray(False))
        raise
    if not np.all(multihost_utils.process_allgather(np.asarray(True))):
        raise ValueError("another process cannot read it")
    return value


def fetch(tree: PyTree) -> PyTree:
    """Gather a tree's arrays on every process, as numpy, one leaf at a time to save memory. Other leaves stay."""

    def gather(leaf: object) -> object:
        if not isinstance(leaf, jax.Array):
            return leaf
        if leaf.is_fully_addressable or leaf.is_fully_replicated:
            return np.asarray(leaf)
        return multihost_utils.process_allgather(leaf, tiled=True)

    return jax.tree.map(gather, tree)
