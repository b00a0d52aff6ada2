"""Preferences, rewards and teachers on eight CPU devices give what they give on one."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

RUNS = """
import sys
from dataclasses import replace
import jax
jax.config.update("jax_num_cpu_devices", 8)
from jaxsteer.optim import OptimConfig
from train.config.distill import DistillConfig, Teacher
from train.config.dpo import DpoConfig, PreferenceLoss
from train.config.grpo import GrpoConfig, PolicyLoss
from train.devices.placement import MeshConfig
from train.run.from_rewards import FromRewards
from train.run.from_teacher import FromTeacher
from train.run.loop import train
from train.run.preferences import FromPreferences
from train.tasks import JsonlTask, PreferenceTask

folder, data, pairs, own, out = sys.argv[1:]
common = dict(
    model=folder, plan=("nonlinear(rank=4) @ block",), optim=OptimConfig(lr=2e-2), steps=2, batch_size=8,
    sequence_length=32, validation_examples=8, evaluate_every=2, test_examples=8, eval_batch_size=8, show_answers=0,
)
task = JsonlTask(data, validation=data, max_new_tokens=2)
preferred = PreferenceTask(pairs, validation=pairs, max_new_tokens=2)
runs = {
    "sigmoid": (FromPreferences(), DpoConfig(task=preferred, preference=PreferenceLoss(beta=1.0), **common)),
    "kto": (FromPreferences(), DpoConfig(task=preferred, preference=PreferenceLoss("kto"), **common)),
    "grpo": (FromRewards(), GrpoConfig(
        task=task, rewards=(f"{own}:odd",), prompts=4, group=4, policy=PolicyLoss(beta=0.1), updates=2, **common)),
    "distill": (FromTeacher(), DistillConfig(task=task, teacher=Teacher(shots=2), **common)),
}
for name, (algorithm, config) in runs.items():
    for mesh in (MeshConfig(1, 1), MeshConfig(2, 2, 2)):
        train(replace(config, mesh=mesh, out=f"{out}/{name}-{mesh.tensor}"), algorithm=algorithm)
"""


@pytest.mark.slow
def test_runs_on_a_mesh_are_runs_on_one_device(tiny_folder, tiny_data, tmp_path):
    pairs = tmp_path / "pairs.jsonl"
    rows = [
        {"prompt": f"{chr(98 + i)}>", "chosen": f"{chr(99 + i)}.", "rejected": f"{chr(97 + i)}?!"} for i in range(24)
    ]
    pairs.write_text("".join(json.dumps(row) + "\n" for row in rows))
    own = tmp_path / "own.py"
    own.write_text("def odd(example, answer):\n    return sum(map(ord, answer)) % 2\n")
    command = [sys.executable, "-c", RUNS, *map(str, (tiny_folder, tiny_data, pairs, own, tmp_path))]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1200, cwd=Path(__file__).parents[2])
    assert done.returncode == 0, done.stderr
    for name in ("sigmoid", "kto", "grpo", "distill"):
        alone, split = (
            [json.loads(line) for line in (tmp_path / f"{name}-{size}" / "metrics.jsonl").read_text().splitlines()]
            for size in (1, 2)
        )
        assert len(alone) == len(split) == 4
        assert all(row["grad_norm"] > 0 for row in alone if "grad_norm" in row)
        for one, other in zip(alone, split, strict=True):
            for key in one.keys() & {"loss", "grad_norm", "reward", "kl", "margin", "teacher_kl", "validation_loss"}:
                np.testing.assert_allclose(other[key], one[key], 2e-4, 1e-6, err_msg=f"{name} {key}")
