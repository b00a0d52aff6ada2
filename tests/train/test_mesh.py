"""Training on a mesh is training on one device: eight CPU devices in a process of their own."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from train.config import MeshConfig, TrainConfig
from train.program import mesh_of

ROOT = Path(__file__).parents[2]

CURVES = """
import jax
jax.config.update("jax_num_cpu_devices", 8)
import numpy as np
from train.config import MeshConfig, SINGLE, TrainConfig
from train.data import DataSource, TokenizedExample
from train.program import make_program, mesh_of
from train.setup import step_batch
from jaxsteer import ModelConfig, OptimConfig, Params, init_base, init_steering, split

features = ModelConfig(vocab_size=64, width=32, layers=2, heads=4, kv_heads=4, head_dim=8, mlp_width=48)
base = jax.jit(init_base, static_argnums=0)(features, jax.random.key(0))
base["embed"]["embedding"] *= 25
draw = np.random.default_rng(0)
examples = []
for length in draw.integers(4, 16, 256):
    prompt = int(draw.integers(1, length))
    weights = (np.arange(length) >= prompt).astype(np.float32)
    examples.append(TokenizedExample(draw.integers(3, 64, length).astype(np.int32), weights, prompt, ""))
data = DataSource(examples, 32, 16)
assert data.fill > 0.9 and (data.batch(0).segments.max(axis=1) > 1).any()

def curve(mesh, accumulate):
    config = TrainConfig(
        plan=("nonlinear(rank=4) @ block", "lora(rank=2) @ projections layers=last:1"), optim=OptimConfig(lr=1e-2),
        rows=32, row_length=16, accumulate=accumulate, mesh=mesh,
    )
    program = make_program(config, features, base, steps=10, mesh=mesh_of(config))
    steering = init_steering(program.model.plan, features, jax.random.key(1), base=base)
    trained, frozen = split(Params(base, steering), program.labels)
    state, frozen = program.begin(trained, jax.random.key(2)), program.place_frozen(frozen)
    before = jax.tree.map(lambda leaf: leaf.sharding, state)
    losses = []
    for step in range(10):
        state, metrics = program.step(state, program.placement.batch(step_batch(config, data, step)), frozen)
        losses.append([float(metrics.loss), float(metrics.grad_norm)])
    if program.mesh is not None:
        assert jax.tree.map(lambda leaf: leaf.sharding, state) == before
        q = frozen.base["blocks"]["attn"]["q"]["kernel"]
        assert q.addressable_shards[0].data.size * program.mesh.shape["fsdp"] * program.mesh.shape["tensor"] == q.size
    return np.array(losses)

meshes = {
    "one device": SINGLE, "data": MeshConfig(8, 1), "fsdp": MeshConfig(1, 8), "fsdp x tensor": MeshConfig(1, 2, 4),
}
for accumulate in (1, 4):
    curves = {name: curve(mesh, accumulate) for name, mesh in meshes.items()}
    want = curves["one device"]
    if accumulate == 1:
        first = want
        assert want[-1, 0] < want[0, 0]
    np.testing.assert_allclose(want, first, 1e-5, 1e-5)
    for name, got in curves.items():
        np.testing.assert_allclose(got, want, 1e-5, 1e-5, err_msg=f"{name}, accumulate {accumulate}")
        print("equal", name, accumulate)
"""

RUN = """
import sys
import jax
jax.config.update("jax_num_cpu_devices", 8)
from train.config import MeshConfig, TrainConfig
from train.sft import train
from train.tasks import JsonlTask
folder, data, out = sys.argv[1:]
config = TrainConfig(
    task=JsonlTask(data, validation=data, max_new_tokens=2), model=folder, plan=("nonlinear(rank=4) @ block",), steps=2,
    rows=4, row_length=32, test_examples=8, eval_rows=8, out=out, mesh=MeshConfig(tensor=2),
)
result = train(config)
print("devices", len(jax.tree.leaves(result.params.base)[0].sharding.device_set))
"""


def run(code, *arguments):
    fast = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
    environment = os.environ | {"XLA_FLAGS": fast}
    command = [sys.executable, "-c", code, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_loss_curves_agree():
    """Ten steps in fp32, packed, post-block and LoRA together, with and without accumulation."""
    out = run(CURVES)
    assert out.count("equal") == 8


def test_a_run_on_eight_devices(tiny_folder, tiny_data, tmp_path):
    """From loading to evaluation and the steering file; four of the rows' shards, two of the heads'."""
    out = run(RUN, tiny_folder, tiny_data, tmp_path / "run")
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
    with pytest.raises(ValueError, match="16 devices cannot be split so"):
        shape(tensor=3)
    assert mesh_of(TrainConfig()) is None  # one CPU device
    with pytest.raises(ValueError, match="needs 8 devices; there are 1"):
        mesh_of(replace(TrainConfig(), mesh=MeshConfig(1, 8)))
