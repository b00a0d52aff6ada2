"""A frozen base costs no weight gradients: no matrix product of the lowered step has a weight's shape as its result."""

from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from tiny import product_shapes

from train.cli import load_config_file
from train.compare.config import CompareConfig
from train.config import TrainConfig
from train.devices.placement import SINGLE
from train.plan.model_configs import model_config_of
from train.plan.programs import base_shapes, lower_training
from train.run.program import make_program

CONFIGS = Path(__file__).parents[2] / "configs"
SMALL = {"batch_size": 3, "sequence_length": 160, "grad_accumulation": 1, "mesh": SINGLE}
"""Rows whose products are no dimension of a weight: a product of activations cannot look like a weight's gradient."""

LARGEST_RANK = 64
"""A kernel's update is a product with its shape too, but with a sum over a rank and not over all tokens."""


def runs(path):
    """The runs of a config file, by name."""
    if path.stem.startswith("compare"):
        comparison = load_config_file(path, CompareConfig)
        return {entry.name: comparison.train_config(entry) for entry in comparison.entries}
    return {"": load_config_file(path, TrainConfig)}


FILES = sorted(path for path in CONFIGS.glob("*.py") if not path.stem.startswith("common"))
RUNS = {f"{path.stem} {name}".strip(): run for path in FILES for name, run in runs(path).items()}
SLOW = ("llama3_70b", "compare")
FROZEN = [
    pytest.param(name, marks=pytest.mark.slow if name.startswith(SLOW) else ())
    for name, run in sorted(RUNS.items())
    if not run.train_base and run.program == TrainConfig.program  # what others learn from is no batch
    if not run.model.startswith("runs/")  # a model that is trained first
]


def weight_gradients(config):
    """Paths of the base's matrices whose shape, or its transpose, some dot_general of the step returns."""
    model_config = model_config_of(config)
    base = base_shapes(model_config, jnp.float32)
    config = replace(config, **SMALL)
    program = make_program(config, model_config, base, steps=10)
    found = product_shapes(lower_training(program, config).as_text(), over=LARGEST_RANK)
    tokens = SMALL["batch_size"] * SMALL["sequence_length"]
    assert (tokens, model_config.width) in found  # the text is what it is taken for
    matrices = {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf.shape[-2:]
        for path, leaf in jax.tree_util.tree_leaves_with_path(base)
        if not jax.tree_util.keystr(path).endswith("['scale']")
    }
    return {path for path, shape in matrices.items() if {shape, shape[::-1]} & found}, set(matrices)


def test_there_are_runs_of_every_size():
    assert {"llama3_8b_joint", "llama3_70b_lora", "listops_smollm2", "compare_listops LoFiT"} <= {
        each.values[0] for each in FROZEN
    }


@pytest.mark.parametrize("name", FROZEN)
def test_a_frozen_base_has_no_weight_gradients(name):
    found, _ = weight_gradients(RUNS[name])
    assert not found


@pytest.mark.parametrize("name", ["llama3_8b_post_block", pytest.param("listops_smollm2", marks=pytest.mark.slow)])
def test_full_fine_tuning_has_them_all(name):
    """But for the embedding, whose gradient is a scatter where the head is not tied to it."""
    found, matrices = weight_gradients(replace(RUNS[name], train_base=True))
    assert found >= matrices - {"embed/embedding"}
