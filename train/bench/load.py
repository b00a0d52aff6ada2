"""The benchmark of loading: what the host holds while each process reads its own parts of a checkpoint."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import jax
import ml_dtypes
import numpy as np

from jaxsteer.io import load_base, save_hf
from jaxsteer.models.config import ModelConfig
from jaxsteer.models.transformer import init_base
from train.devices.machine import peak_memory_bytes
from train.devices.placement import MeshConfig, place_on
from train.devices.processes import DistributedConfig, join


@dataclass(frozen=True)
class LoadBench:
    """Time loading onto CPU devices and weigh the host, on several devices and as one of several processes."""

    model: str | None = None
    """A local folder or .gguf file; by default a Llama of random bf16 weights is made, and deleted afterwards."""
    gigabytes: float = 2.0
    """Size of that one."""
    folder: str | None = None
    """Where it is made; by default among the system's temporary files."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Of the loaded weights."""
    devices: tuple[int, ...] = (1, 2, 8)
    """Devices of one process, which the weights are split over."""
    processes: tuple[int, ...] = (2, 4)
    """Processes of one device each, which the weights are split over."""
    json: str | None = None
    """Write the figures to this file."""


@dataclass(frozen=True)
class _Task:
    """What one process is to load: the weights in equal parts, some of which are its own."""

    model: str
    dtype: str
    devices: int
    processes: int = 1
    process: int = 0
    port: int = 0


def bench_load(config: LoadBench) -> dict[str, dict[str, float]]:
    """Run the benchmark; figures by setting, of the process that has the largest where there are several."""
    with tempfile.TemporaryDirectory(dir=config.folder) as folder:
        model = config.model or _random_model(Path(folder) / "model", config.gigabytes)
        settings = [(n, 1) for n in config.devices] + [(1, n) for n in config.processes]
        return {_name(*setting): _measure(model, config.dtype, *setting) for setting in settings}


def _name(devices: int, processes: int) -> str:
    return f"1 of {processes} processes" if processes > 1 else f"{devices} device{'s' * (devices > 1)}"


def _random_model(folder: Path, gigabytes: float) -> str:
    """A Llama with as many layers as make up that size in bf16."""
    layers = lambda n: ModelConfig(32_000, 2048, n, 16, 4, 128, 8192)
    shapes = lambda n: jax.eval_shape(lambda: init_base(layers(n), jax.random.key(0)))
    nbytes = lambda n: sum(2 * leaf.size for leaf in jax.tree.leaves(shapes(n)))
    count = max(1, round((1e9 * gigabytes - nbytes(1)) / (nbytes(2) - nbytes(1))) + 1)
    draw = np.random.default_rng(0)

    def small(leaf: jax.ShapeDtypeStruct) -> np.ndarray:
        """Numbers from 0 to 2; matrices of blocks lie in memory as in the file, which they are turned for."""
        turned = len(leaf.shape) == 3
        shape = (leaf.shape[0], leaf.shape[2], leaf.shape[1]) if turned else leaf.shape
        drawn = draw.integers(0, 1 << 14, shape, np.uint16).view(ml_dtypes.bfloat16)
        return drawn.swapaxes(1, 2) if turned else drawn

    save_hf(folder, layers(count), jax.tree.map(small, shapes(count)), "llama")
    return str(folder)


def _measure(model: str, dtype: str, devices: int, processes: int) -> dict[str, float]:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    tasks = [_Task(model, dtype, devices, processes, number, port) for number in range(processes)]
    command = [sys.executable, "-m", "train.bench.load"]
    started = [
        subprocess.Popen(
            [*command, json.dumps(asdict(task))], text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        for task in tasks
    ]
    ended = [process.communicate() for process in started]
    for process, (_, errors) in zip(started, ended, strict=True):
        if process.returncode:
            raise ValueError(f"bench load: a process failed:\n{errors.strip()}")
    found = [json.loads(out.splitlines()[-1]) for out, _ in ended]
    most = {name: max(each[name] for each in found) for name in found[0]}
    return most | {"GB/s": sum(each["read, GB"] for each in found) / most["seconds"]}


def _load(task: _Task) -> dict[str, float]:
    """Load this process's parts. The devices' memory is the host's too: what is kept is part of the peak."""
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", task.devices)
    if task.processes > 1:
        join(DistributedConfig("yes", f"localhost:{task.port}", task.processes, task.process))
    place = place_on(MeshConfig(1, len(jax.devices()), 1), len(jax.devices())).base
    read = 0

    def progress(done: int, total: int) -> None:
        nonlocal read
        read = done

    before, began = peak_memory_bytes(), time.perf_counter()
    base = jax.block_until_ready(load_base(task.model, dtype=task.dtype, progress=progress, place=place))
    seconds, peak = time.perf_counter() - began, peak_memory_bytes()
    shards = [[shard.data.nbytes for shard in leaf.addressable_shards] for leaf in jax.tree.leaves(base)]
    kept, largest = sum(map(sum, shards)), max(map(max, shards))
    return {
        "read, GB": read / 1e9,
        "seconds": seconds,
        "peak, GB": peak / 1e9,
        "before, GB": before / 1e9,
        "kept, GB": kept / 1e9,
        "largest shard, GB": largest / 1e9,
        "beyond, GB": (peak - before - kept) / 1e9,
    }


if __name__ == "__main__":
    print(json.dumps(_load(_Task(**json.loads(sys.argv[1])))))
