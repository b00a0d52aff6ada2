"""Loss curves of ten steps on several meshes, as JSON lines: what the tests of meshes and processes compare.

    loss_curves.py OUT MESHES PLAN ... [--process 0 --port 1234]

fp32, packed rows. MESHES are sizes of data, fsdp and tensor, such as 1x8x1,1x2x4; a PLAN is the text of its slots,
joined by semicolons. With --process this is one of two processes with four devices each, otherwise eight are here.
"""

import argparse
import json
from pathlib import Path

import jax
import numpy as np

from jaxsteer import ModelConfig, OptimConfig, Params, init_base, init_steering, partition
from train.config import TrainConfig
from train.data import DataSource, TokenizedExample
from train.devices.machine import enable_compilation_cache
from train.devices.placement import MeshConfig
from train.devices.processes import DistributedConfig, join
from train.run.program import make_program, mesh_of
from train.run.training import step_batch

FEATURES = ModelConfig(vocab_size=64, width=32, layers=2, heads=4, kv_heads=4, head_dim=8, mlp_width=48)
ROWS, LENGTH, STEPS = 32, 16, 10


def make_base():
    """Random, with an embedding large enough that the loss falls."""
    base = jax.jit(init_base, static_argnums=0)(FEATURES, jax.random.key(0))
    base["embed"]["embedding"] *= 25
    return jax.tree.map(np.asarray, base)


def make_data():
    """Packed rows of random tokens."""
    draw, examples = np.random.default_rng(0), []
    for length in draw.integers(4, 16, 256):
        prompt = int(draw.integers(1, length))
        completion = np.arange(length) >= prompt
        examples.append(TokenizedExample(draw.integers(3, 64, length).astype(np.int32), completion, prompt, ""))
    data = DataSource(examples, ROWS, LENGTH)
    assert data.fill > 0.9
    assert (data.batch(0).segments.max(axis=1) > 1).any()
    return data


def curve(plan, mesh, accumulate, base, data):
    """[loss, gradient's norm] of each step."""
    config = TrainConfig(
        plan=plan,
        optim=OptimConfig(lr=1e-2),
        batch_size=ROWS,
        sequence_length=LENGTH,
        grad_accumulation=accumulate,
        mesh=mesh,
    )
    program = make_program(config, FEATURES, base, steps=STEPS, mesh=mesh_of(config))
    steering = init_steering(program.model.plan, FEATURES, jax.random.key(1), base=base)
    trained, frozen = partition(Params(base, steering), program.labels)
    state, frozen = program.begin(trained, jax.random.key(2)), program.place_frozen(frozen)
    before = jax.tree.map(lambda leaf: leaf.sharding, state)
    own, rows, losses = program.placement.own_rows(ROWS // accumulate), ROWS // accumulate, []
    for step in range(STEPS):
        batch = program.placement.batch(step_batch(config, data, step, own), rows, own.start)
        state, metrics = program.step(state, batch, frozen)
        losses.append([float(metrics.loss), float(metrics.grad_norm)])
    if program.mesh is not None:
        assert jax.tree.map(lambda leaf: leaf.sharding, state) == before
        q = frozen.base["blocks"]["attn"]["q"]["kernel"]
        assert q.addressable_shards[0].data.size * program.mesh.shape["fsdp"] * program.mesh.shape["tensor"] == q.size
    return losses


def main():
    """Write a line for each plan, mesh and number of microbatches."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("meshes")
    parser.add_argument("plans", nargs="+")
    parser.add_argument("--process", type=int)
    parser.add_argument("--port", type=int)
    parser.add_argument("--grad-accumulation", type=int, nargs="+", default=[1, 4])
    asked = parser.parse_args()
    jax.config.update("jax_num_cpu_devices", 8 if asked.process is None else 4)
    if asked.process is not None:
        join(DistributedConfig(coordinator=f"localhost:{asked.port}", processes=2, process=asked.process))
    else:
        enable_compilation_cache()
    base, data = make_base(), make_data()
    with open(asked.out, "w", encoding="utf-8") as file:
        for plan in asked.plans:
            for mesh in asked.meshes.split(","):
                for accumulate in asked.grad_accumulation:
                    sizes = MeshConfig(*map(int, mesh.split("x")))
                    losses = curve(tuple(plan.split(";")), sizes, accumulate, base, data)
                    row = {"plan": plan, "mesh": mesh, "grad_accumulation": accumulate, "losses": losses}
                    file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
