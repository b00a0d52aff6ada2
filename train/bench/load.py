"""The loading benchmark: host memory and time while each process reads its own parts of a checkpoint.

Each setting runs in its own processes, as `python -m train.bench.load TASK`, which are not meant to be called by hand.
"""

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
from jaxsteer.ranges import Count, Positive, check_ranges
from train.devices.machine import peak_memory_bytes
from train.devices.placement import MeshConfig, place_on
from train.devices.processes import DistributedConfig, join


@dataclass(frozen=True)
class LoadBench:
    """Measure time and host memory of loading onto CPU devices: several devices, or one of several processes."""

    model: str | None = None
    """Local folder or .gguf file; by default a Llama with random bf16 weights is made, and deleted afterwards."""
    gigabytes: Positive = 2.0
    """Size of that Llama."""
    folder: str | None = None
    """Folder to make it in; by default the system's temporary folder."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Data type of the loaded weights."""
    devices: tuple[Count, ...] = (1, 2, 8)
    """Numbers of devices of one process to split the weights over, each measured."""
    processes: tuple[Count, ...] = (2, 4)
    """Numbers of processes with one device each to split the weights over, each measured."""
    json: str | None = None
    """Write the figures to this file."""

    def __post_init__(self) -> None:
        """Reject settings that nothing can be measured with."""
        check_ranges(self)


@dataclass(frozen=True)
class _Task:
    """What one process loads: its parts of the weights, which are split equally."""

    model: str
    dtype: str
    devices: int
    processes: int = 1
    process: int = 0
    port: int = 0


def bench_load(config: LoadBench) -> dict[str, dict[str, float]]:
    """Run the loading benchmark.

    Returns:
        Figures by setting; with several processes, the largest of each figure.
    """
    with tempfile.TemporaryDirectory(dir=config.folder) as folder:
        model = config.model or _random_model(Path(folder) / "model", config.gigabytes)
        settings = [*((n, 1) for n in config.devices), *((1, n) for n in config.processes)]
        return {_name(*setting): _measure(model, config.dtype, *setting) for setting in settings}


def _name(devices: int, processes: int) -> str:
    return f"1 of {processes} processes" if processes > 1 else f"{devices} device{'s' * (devices > 1)}"


def _random_model(folder: Path, gigabytes: float) -> str:
    """Write a Llama with as many layers as make up that size in bf16."""
    with_layers = lambda n: ModelConfig(32_000, 2048, n, 16, 4, 128, 8192)
    shapes = lambda n: jax.eval_shape(lambda: init_base(with_layers(n), jax.random.key(0)))
    nbytes = lambda n: sum(2 * leaf.size for leaf in jax.tree.leaves(shapes(n)))
    layers = max(1, round((1e9 * gigabytes - nbytes(1)) / (nbytes(2) - nbytes(1))) + 1)
    draw = np.random.default_rng(0)

    def random(leaf: jax.ShapeDtypeStruct) -> np.ndarray:
        """Numbers from 0 to 2. The blocks' matrices have the file's memory layout, which is transposed."""
        transposed = len(leaf.shape) == 3
        shape = (leaf.shape[0], leaf.shape[2], leaf.shape[1]) if transposed else leaf.shape
        values = draw.integers(0, 1 << 14, shape, np.uint16).view(ml_dtypes.bfloat16)
        return values.swapaxes(1, 2) if transposed else values

    save_hf(folder, with_layers(layers), jax.tree.map(random, shapes(layers)), "llama")
    return str(folder)


def _measure(model: str, dtype: str, devices: int, processes: int) -> dict[str, float]:
    """Load in processes of their own, and collect their figures."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "train.bench.load"]
    started = [
        subprocess.Popen(
            [*command, json.dumps(asdict(_Task(model, dtype, devices, processes, number, port)))],
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        for number in range(processes)
    ]
    outputs = [process.communicate() for process in started]
    for process, (_, errors) in zip(started, outputs, strict=True):
        if process.returncode:
            raise ValueError(f"bench load: a process failed:\n{errors.strip()}")
    figures = [json.loads(out.splitlines()[-1]) for out, _ in outputs]
    largest = {name: max(each[name] for each in figures) for name in figures[0]}
    return largest | {"GB/s": sum(each["read, GB"] for each in figures) / largest["seconds"]}


def _load(task: _Task) -> dict[str, float]:
    """Load this process's parts. On CPU, devices use the host's memory: the loaded weights are part of the peak."""
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
