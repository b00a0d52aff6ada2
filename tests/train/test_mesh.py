"""Training on a mesh is training on one device: eight CPU devices in a process of their own, or in two."""

import json
import os
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from jaxsteer import interventions
from train.config import TrainConfig
from train.devices.placement import MeshConfig
from train.run.program import mesh_of

ROOT = Path(__file__).parents[2]

CURVES = Path(__file__).with_name("loss_curves.py")
JOINT = "nonlinear(rank=4) @ block;lora(rank=2) @ projections layers=last:1"
SINGLE, PAIR = "1x1x1", "2x2x2"
ON_EIGHT = ("8x1x1", "1x8x1", "1x2x4")
METHODS = (
    *("fixed @ block", "linear(rank=4) @ block", "nonlinear(rank=4) @ mlp.in", "loreft(rank=4) @ block"),
    *("direft(rank=4) @ block", "lofit_scale @ attn.heads", "lofit @ attn.heads", "jola @ attn.heads"),
    *("lora(rank=2) @ projections", "rslora(rank=2) @ projections", "dora(rank=2) @ projections"),
    "pissa(rank=2) @ projections",
)

RUN = """
import sys
import jax
jax.config.update("jax_num_cpu_devices", 8)
from train.config import TrainConfig
from train.devices.placement import MeshConfig
from train.run.loop import train
from train.tasks import JsonlTask
folder, data, out = sys.argv[1:]
config = TrainConfig(
    task=JsonlTask(data, validation=data, max_new_tokens=2), model=folder, plan=("nonlinear(rank=4) @ block",), steps=2,
    batch_size=4, sequence_length=32, test_examples=8, eval_batch_size=8, out=out, mesh=MeshConfig(tensor=2),
)
result = train(config)
print("devices", len(jax.tree.leaves(result.params.base)[0].sharding.device_set))
"""


QUICK = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
FAST = {"XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {QUICK}"}


def run(*arguments):
    """Output of a Python program with eight CPU devices."""
    command = [sys.executable, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1200, cwd=ROOT, env=os.environ | FAST)
    assert done.returncode == 0, done.stderr
    return done.stdout


def curves(folder, meshes, plans, *options, processes=1):
    """{(plan, mesh, microbatches): [loss, gradient's norm] of ten steps}, from one process or from two."""
    files = [folder / f"{processes}-{number}.jsonl" for number in range(processes)]
    if processes == 1:
        run(CURVES, files[0], ",".join(meshes), *plans, *options)
    else:
        command = lambda out: [sys.executable, CURVES, out, ",".join(meshes), *plans, *options]
        both = pair(command(files[0]), command(files[1]), FAST)
        outputs = [process.communicate(timeout=1200)[0] for process in both]
        assert [process.returncode for process in both] == [0, 0], "\n----\n".join(outputs)
    found = [[json.loads(line) for line in file.read_text().splitlines()] for file in files]
    assert all(each == found[0] for each in found)
    return {(row["plan"], row["mesh"], row["grad_accumulation"]): np.array(row["losses"]) for row in found[0]}


def pair(first, second, environment):
    """Two processes that are to find each other."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    return [
        subprocess.Popen(
            [*map(str, command), "--process", str(number), "--port", port],
            cwd=ROOT,
            env=os.environ | environment,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        for number, command in enumerate((first, second))
    ]


def agree(found, tolerance=1e-5):
    """All curves of a plan agree, whatever the mesh and, where nothing is drawn anew, the number of microbatches."""
    for (plan, mesh, accumulate), got in found.items():
        first = found[plan, SINGLE, accumulate if "jola" in plan else 1]
        np.testing.assert_allclose(got, first, tolerance, tolerance, err_msg=f"{plan}, {mesh}, {accumulate}")
        assert got[-1, 0] < got[0, 0]


def test_loss_curves_agree(tmp_path):
    """Ten steps in fp32, packed, post-block and LoRA together: one device, and eight."""
    found = curves(tmp_path, (SINGLE, "1x2x4"), [JOINT], "--grad-accumulation", 1)
    assert len(found) == 2
    agree(found)


@pytest.mark.slow
def test_loss_curves_of_two_processes_agree(tmp_path):
    """The same, against two processes with four devices each that accumulate."""
    found = curves(tmp_path, [SINGLE], [JOINT], "--grad-accumulation", 1)
    found |= curves(tmp_path, [PAIR], [JOINT], "--grad-accumulation", 4, processes=2)
    assert len(found) == 2
    agree(found)


@pytest.mark.slow
def test_loss_curves_of_every_plan_agree(tmp_path):
    """Post-block and LoRA together, and every method alone, on every mesh, with and without accumulation."""
    plans = (JOINT, *METHODS)
    assert {text.partition("(")[0].split()[0] for text in METHODS} == set(interventions.METHODS)
    found = curves(tmp_path, (SINGLE, *ON_EIGHT), plans) | curves(tmp_path, [PAIR], plans, processes=2)
    assert len(found) == 10 * len(plans)
    agree(found)


def test_a_run_on_eight_devices(tiny_folder, tiny_data, tmp_path):
    """From loading to evaluation and the steering file; four of the rows' shards, two of the heads'."""
    out = run("-c", RUN, tiny_folder, tiny_data, tmp_path / "run")
    assert "data 1 x fsdp 4 x tensor 2" in out
    assert "devices 8" in out
    assert (tmp_path / "run" / "steering.safetensors").exists()


def test_mesh_settings():
    shape = lambda **settings: MeshConfig(**settings).shape(16, 32)
    sizes = lambda found: (found.data, found.fsdp, found.tensor)
    assert sizes(shape()) == (1, 16, 1)
    assert sizes(shape(tensor=4)) == (1, 4, 4)
    assert sizes(shape(data=4)) == (4, 4, 1)
    assert sizes(shape(fsdp=2)) == (8, 2, 1)
    assert sizes(shape(data=2, fsdp=2, tensor=2)) == (2, 2, 2)
    with pytest.raises(ValueError, match="cannot split 16 devices this way"):
        shape(tensor=3)
    assert mesh_of(TrainConfig()) is None  # one CPU device
    with pytest.raises(ValueError, match="needs 8 devices; there are 1"):
        mesh_of(replace(TrainConfig(), mesh=MeshConfig(1, 8)))


@pytest.mark.parametrize("name", ["data", "fsdp", "tensor"])
def test_an_axis_of_no_devices_is_refused(name):
    with pytest.raises(ValueError, match=rf"--mesh\.{name} must be at least 1, got 0"):
        MeshConfig(**{name: 0})
