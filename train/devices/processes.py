"""Several processes as one run: how they find each other, what the first one does for all, and values they share.

Every process runs the same program on its own devices; `jax.distributed` joins them, and arrays then lie on the devices
of all. Files of a run are written by process 0, but for checkpoints, which each writes its part of.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from jaxsteer.types import PyTree

T = TypeVar("T")


@dataclass(frozen=True)
class DistributedConfig:
    """How the processes of a run on several hosts find each other."""

    join: Literal["auto", "yes", "no"] = "auto"
    """auto: where the settings below, JAX_COORDINATOR_ADDRESS, SLURM, Open MPI or a TPU pod on GKE say that there are
    several; yes: also where only the machine knows (TPU VMs); no: each process is a run of its own."""
    coordinator: str | None = None
    """host:port of process 0, where nothing in the environment says it; or JAX_COORDINATOR_ADDRESS."""
    processes: int | None = None
    """Their number; or JAX_NUM_PROCESSES."""
    process: int | None = None
    """The number of this one, from 0; or JAX_PROCESS_ID."""
    timeout: int = 100
    """Seconds without a sign of life after which a process counts as dead and the others stop."""


def join(config: DistributedConfig, environment: Mapping[str, str] = os.environ) -> None:
    """Join the other processes of this run, if there are any. Before anything else that starts JAX.

    Raises:
        ValueError: settings that are not whole, or the others do not answer.
    """
    if config.join == "no" or jax.distributed.is_initialized():
        return
    asked = explicit(config, environment)
    if not asked and config.join == "auto" and not several(environment):
        return
    try:
        jax.distributed.initialize(
            **asked,
            local_device_ids=own_gpus(environment),
            heartbeat_timeout_seconds=config.timeout,
            shutdown_timeout_seconds=config.timeout,
        )
    except (RuntimeError, ValueError) as error:
        where = asked.get("coordinator_address", "the coordinator that the environment names")
        raise ValueError(
            f"distributed: this process could not join the others at {where} ({error}). Every process needs the same "
            "coordinator and number of processes, and a number of its own; --distributed.join no runs it alone"
        ) from None


def explicit(config: DistributedConfig, environment: Mapping[str, str]) -> dict[str, Any]:
    """Arguments of `jax.distributed.initialize` from the settings, or the environment's JAX_ variables; {} without.

    Raises:
        ValueError: some of the three are given, but not all, or one is no number.
    """

    def number(name: str, given: int | None, variable: str) -> int | None:
        text = environment.get(variable)
        if given is not None or text is None:
            return given
        if not text.isdecimal():
            raise ValueError(f"{variable}: must be a number ({name}), got {text!r}")
        return int(text)

    found = {
        "coordinator_address": config.coordinator or environment.get("JAX_COORDINATOR_ADDRESS"),
        "num_processes": number("how many processes", config.processes, "JAX_NUM_PROCESSES"),
        "process_id": number("which of them", config.process, "JAX_PROCESS_ID"),
    }
    missing = [name for name, value in found.items() if value is None]
    if len(missing) == len(found):
        return {}
    if missing and not several(environment):
        names = {"coordinator_address": "coordinator", "num_processes": "processes", "process_id": "process"}
        raise ValueError(
            f"distributed: {', '.join(names[name] for name in missing)} missing; give all of coordinator, processes "
            "and process (or JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES, JAX_PROCESS_ID), or none of them"
        )
    return {name: value for name, value in found.items() if value is not None}


def several(environment: Mapping[str, str]) -> bool:
    """Whether SLURM, Open MPI or a TPU pod's variables speak of more than one process."""
    count = lambda name: int(environment.get(name) or 1)
    slurm = count("SLURM_NTASKS") > 1 and "SLURM_PROCID" in environment and "SLURM_STEP_NODELIST" in environment
    hosts = (environment.get("TPU_PROCESS_ADDRESSES") or environment.get("TPU_WORKER_HOSTNAMES") or "").split(",")
    return slurm or count("OMPI_COMM_WORLD_SIZE") > 1 or len(hosts) > 1 or count("MEGASCALE_NUM_SLICES") > 1


def own_gpus(environment: Mapping[str, str]) -> list[int] | None:
    """A SLURM task's share of its node's GPUs; None elsewhere.

    JAX by itself gives each task one GPU, which wastes the others where a node has one task for all.
    """
    gpus, tasks = environment.get("SLURM_GPUS_ON_NODE", ""), environment.get("SLURM_NTASKS_PER_NODE", "")
    local = environment.get("SLURM_LOCALID", "")
    if not (gpus.isdecimal() and tasks.isdecimal() and local.isdecimal()) or int(gpus) < int(tasks):
        return None
    share = int(gpus) // int(tasks)
    return list(range(int(local) * share, (int(local) + 1) * share))


def is_first() -> bool:
    """Whether this is process 0, which writes the files and speaks to the console."""
    return jax.process_index() == 0


def on_first(action: Callable[[], T]) -> T:
    """Do something on process 0 and give every process its outcome, a JSON value; or its error.

    Raises:
        ValueError: on every process, where the action raised ValueError or OSError on process 0.
    """
    if jax.process_count() == 1:
        return action()
    outcome: dict[str, Any] = {}
    if is_first():
        try:
            outcome = {"value": action()}
        except (ValueError, OSError) as error:
            outcome = {"error": str(error)}
    text = np.frombuffer(json.dumps(outcome).encode(), np.uint8)
    size = int(multihost_utils.broadcast_one_to_all(np.int32(len(text))))
    sent = multihost_utils.broadcast_one_to_all(np.resize(text, size))
    outcome = json.loads(bytes(np.asarray(sent, np.uint8)))
    if "error" in outcome:
        raise ValueError(outcome["error"])
    return outcome["value"]


def together(read: Callable[[], Any]) -> Any:
    """Call `read`; where it fails in one process, fail in all of them, so that all go on to the same thing."""
    if jax.process_count() == 1:
        return read()
    error: Exception | None = None
    value = None
    try:
        value = read()
    except Exception as caught:
        error = caught
    fine = multihost_utils.process_allgather(np.asarray(error is None))
    if error is not None:
        raise error
    if not bool(np.all(fine)):
        raise ValueError("another process cannot read it")
    return value


def fetch(tree: PyTree) -> PyTree:
    """Arrays as numpy, whole, on every process; leaf by leaf, so that only the result is held twice."""

    def whole(leaf: Any) -> Any:
        if not isinstance(leaf, jax.Array):
            return leaf
        if leaf.is_fully_addressable or leaf.is_fully_replicated:
            return np.asarray(leaf)
        return multihost_utils.process_allgather(leaf, tiled=True)

    return jax.tree.map(whole, tree)
