"""The machine: location of caches, compiled programs shared between processes, plausible measurements."""

import os
import platform
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsteer.io import cache_folder
from train.__main__ import HUGE_PAGES, KEPT_MEMORY, set_allocator
from train.devices.machine import device_summary, matmul_peak_flops, peak_memory_bytes

ROOT = Path(__file__).parents[2]


def test_cache_folder_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("JAXSTEER_CACHE", str(tmp_path / "chosen"))
    assert cache_folder() == tmp_path / "chosen"
    monkeypatch.delenv("JAXSTEER_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "jaxsteer"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder() == Path.home() / ".cache" / "jaxsteer"


PROGRAM = """
import jax, jax.numpy as jnp
from train.devices.machine import enable_compilation_cache
hits = []
jax.monitoring.register_event_listener(lambda event, **_: hits.append(event))
enable_compilation_cache()
print(jax.jit(lambda x: jnp.tanh(x) @ x.T)(jnp.ones((3, 4))).sum())
print(sum("cache_hits" in event for event in hits))
"""


def test_a_second_process_loads_what_the_first_compiled(tmp_path):
    environment = {**os.environ, "JAXSTEER_CACHE": str(tmp_path), "JAX_PLATFORMS": "cpu"}

    def hits():
        command = [sys.executable, "-c", PROGRAM]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        return int(done.stdout.split()[-1])

    assert hits() == 0
    assert any((tmp_path / "xla").iterdir())
    assert hits() >= 1


def test_peak_memory_sees_an_allocation():
    before = peak_memory_bytes()
    assert before > 20e6
    block = np.ones(int(before) // 8 + 1_000_000)  # more than was ever in use, whatever is free of it
    after = peak_memory_bytes()
    assert after > before or jax.default_backend() != "cpu"
    assert after >= block.nbytes or jax.default_backend() != "cpu"


def test_matmul_rate_is_plausible():
    assert 1e8 < matmul_peak_flops(jnp.float32) < 1e16


def test_summary_is_one_line():
    text = device_summary()
    assert "\n" not in text
    assert jax.default_backend() in text
    assert jax.__version__ in text


@pytest.mark.parametrize(
    ("name", "own", "found"),
    [
        ("sft", None, KEPT_MEMORY),
        ("serve", None, HUGE_PAGES),
        ("sft", "glibc.malloc.check=0", "glibc.malloc.check=0"),
    ],
)
def test_a_command_starts_again_with_its_allocator_unless_told_otherwise(name, own, found, monkeypatch):
    begun = []
    monkeypatch.setattr(os, "execv", lambda *args: begun.append(args))
    monkeypatch.setattr(sys, "platform", "linux")
    others = {name: value for name, value in os.environ.items() if name != "GLIBC_TUNABLES"}
    monkeypatch.setattr(os, "environ", others | ({"GLIBC_TUNABLES": own} if own else {}))
    set_allocator(name)
    assert begun == ([] if own else [(sys.executable, sys.orig_argv)])
    assert os.environ["GLIBC_TUNABLES"] == found


STEPS = """
import resource
from train.__main__ import compute_in_the_calling_thread, set_allocator
set_allocator("sft")
compute_in_the_calling_thread("sft")
import jax, jax.numpy as jnp
step = jax.jit(lambda x: jnp.sum(jnp.roll(x @ x.T, 1)))
x = jnp.zeros((4096, 16))
faults = []
for _ in range(8):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    step(x).block_until_ready()
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(sorted(faults)[2])
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the setting is glibc's")
def test_a_repeated_step_finds_the_memory_of_its_temporaries_again():
    environment = {name: value for name, value in os.environ.items() if name != "GLIBC_TUNABLES"}
    environment["JAX_PLATFORMS"] = "cpu"
    command = [sys.executable, "-c", STEPS]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=ROOT, check=True)
    assert int(done.stdout) < 10  # pages in the best steps; 64 MB of temporaries are 32 huge ones
