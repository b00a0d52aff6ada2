"""Facts about the machine: compilation cache, peak memory, matmul speed, hardware, and versions of packages."""

from __future__ import annotations

import hashlib
import os
import platform
import resource
import statistics
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

import jaxsteer
from jaxsteer.io import cache_folder
from jaxsteer.types import Array
from train.devices.chips import chip_of

_PROJECTION = (2048, 576, 1536)  # rows, inner, columns: a SmolLM2 MLP projection over 2,048 tokens
_SQUARES = {"cpu": (1024, 2048), "gpu": (4096, 8192), "tpu": (4096, 8192)}


def enable_compilation_cache() -> Path:
    """Cache compiled programs in a folder under `cache_folder()/xla`, for later processes to load.

    Each kind of processor has a folder of its own: machines with different instruction sets may share a home folder,
    and a program compiled for one CPU could crash on another.

    Call it before the first compilation: JAX decides once per process whether to use a cache.

    Returns:
        The folder.
    """
    folder = cache_folder() / "xla" / _processor()
    folder.mkdir(parents=True, exist_ok=True)
    jax.config.update("jax_compilation_cache_dir", str(folder))
    # By default JAX caches only programs that took a second to compile; a run on a CPU has many smaller ones.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    return folder


def peak_memory_bytes() -> int:
    """Peak memory so far, in bytes: of the fullest local device, or of the process on a CPU."""
    stats = [device.memory_stats() or {} for device in jax.local_devices() if device.platform != "cpu"]
    if peaks := [int(device["peak_bytes_in_use"]) for device in stats if "peak_bytes_in_use" in device]:
        return max(peaks)
    return _peak_resident_bytes()


def memory_bytes() -> int:
    """Memory of a local device, in bytes; that of the machine on a CPU."""
    limits = [(device.memory_stats() or {}).get("bytes_limit", 0) for device in jax.local_devices()]
    if jax.default_backend() != "cpu" and min(limits) > 0:
        return min(limits)
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def matmul_peak_flops(dtype: jnp.dtype | type = jnp.float32) -> float:
    """The highest measured matmul rate of one device, in FLOP/s: an upper bound for a run.

    Takes the median over repeats for each of a few shapes, then the best shape. Matmuls run at JAX's default precision,
    as the model's do.

    Args:
        dtype: of both operands and the result.
    """
    rows, inner, columns = _PROJECTION
    squares = _SQUARES.get(jax.default_backend(), _SQUARES["cpu"])
    shapes = [(rows, inner, columns), *((n, n, n) for n in squares)]
    return max(_matmul_flops(*shape, dtype=jnp.dtype(dtype)) for shape in shapes)


def peak_flops(mesh: Mesh | None, dtype: jnp.dtype | type) -> float | None:
    """Published matmul FLOP/s of all devices of a run together.

    Args:
        mesh: the run's; None for one device of this process.
        dtype: of the matmuls.

    Returns:
        None if a device is not a known accelerator, such as a CPU.
    """
    total = 0.0
    for device in jax.local_devices()[:1] if mesh is None else mesh.devices.flat:
        chip = chip_of(device.device_kind)
        peak = chip.peak(dtype) if chip else None
        if peak is None:
            return None
        total += peak
    return total


def device_summary() -> str:
    """One line: platform, number and kind of devices, number of processes if several, JAX version."""
    devices = jax.devices()
    kinds = " + ".join(sorted({device.device_kind for device in devices}))
    processes = f" in {jax.process_count()} processes" if jax.process_count() > 1 else ""
    return f"{devices[0].platform}: {len(devices)} x {kinds}{processes}, jax {jax.__version__}"


def machine_facts() -> dict[str, Any]:
    """This machine's processor, cores, memory_gb and system."""
    names = [line.partition(":")[2].strip() for line in _cpuinfo() if line.startswith("model name")]
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return {
        "processor": names[0] if names else platform.processor(),
        "cores": os.cpu_count(),
        "memory_gb": round(pages / 1e9, 1),
        "system": platform.platform(terse=True),
    }


def versions() -> dict[str, str]:
    """Versions of jaxsteer, Python and the packages that figures depend on."""
    names = ("jax", "jaxlib", "flax", "optax")
    return {"jaxsteer": jaxsteer.__version__, "python": platform.python_version()} | {n: version(n) for n in names}


def _matmul_flops(m: int, k: int, n: int, dtype: jnp.dtype, seconds: float = 0.3) -> float:
    @jax.jit
    def product(a: Array, b: Array) -> Array:
        return a @ b

    a, b = jnp.full((m, k), 0.5, dtype), jnp.full((k, n), 0.5, dtype)
    product(a, b).block_until_ready()  # compiles
    times: list[float] = []
    stop = time.perf_counter() + seconds
    while len(times) < 5 or (time.perf_counter() < stop and len(times) < 100):
        start = time.perf_counter()
        product(a, b).block_until_ready()
        times.append(time.perf_counter() - start)
    return 2 * m * k * n / statistics.median(times)


def _peak_resident_bytes() -> int:
    # ru_maxrss of a new process starts at its parent's peak; VmHWM counts this process alone.
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        status = ""
    for line in status.splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _cpuinfo() -> list[str]:
    """The lines of /proc/cpuinfo; [] where there is none."""
    info = Path("/proc/cpuinfo")
    return info.read_text().splitlines() if info.exists() else []


def _processor() -> str:
    """A name for this processor's architecture and instruction sets."""
    lines = _cpuinfo() or [platform.processor()]
    flags = next((line for line in lines if line.startswith(("flags", "Features"))), lines[0])
    return f"{platform.machine()}-{hashlib.sha256(flags.encode()).hexdigest()[:8]}"
