"""Runs trained as one program equal the runs trained one by one; LoFiT's two stages."""

from dataclasses import replace

import jax
import numpy as np
import pytest

from jaxsteer.interventions import strongest_heads
from jaxsteer.io import load_steering
from jaxsteer.optim import OptimConfig
from jaxsteer.orthogonality import Orthogonality
from train.base_models import load
from train.compare import sweep
from train.compare.sweep import Run, train_runs
from train.config import TrainConfig
from train.lofit import train_lofit
from train.run.lofit import lofit
from train.tasks import JsonlTask

JOINT = ("lora(rank=2) @ mlp.down", "nonlinear(rank=4) @ block", "loreft(rank=2) @ block", "jola @ attn.heads")


@pytest.fixture(scope="module")
def config(tiny_folder, tiny_data):
    return TrainConfig(
        task=JsonlTask(str(tiny_data), validation=str(tiny_data), max_new_tokens=2),
        model=str(tiny_folder),
        plan=JOINT,
        optim=OptimConfig(lr=1e-2, weights_lr=3e-3),
        orthogonality=Orthogonality("projection"),
        steps=4,
        batch_size=2,
        sequence_length=32,
        validation_examples=8,
        test_examples=8,
        eval_batch_size=8,
    )


@pytest.fixture(scope="module")
def loaded(tiny_folder):
    return load(str(tiny_folder), "float32")


def test_runs_together_equal_the_runs_alone(config, loaded):
    """Different learning rates on the same batches, and different seeds on different batches."""
    references = {}
    done = []
    for runs in ([Run(0.5, 0), Run(2.0, 0)], [Run(0.5, 0), Run(0.5, 7)]):
        together = train_runs(config, loaded, runs, advance=done.append)
        for run, trained in zip(runs, together, strict=True):
            if run not in references:
                references[run] = train_runs(config, loaded, [run])[0]
            alone = references[run]
            np.testing.assert_allclose(trained.losses, alone.losses, rtol=1e-5)
            np.testing.assert_allclose(trained.overlap, alone.overlap, atol=1e-6)
            leaves = jax.tree.leaves(trained.params.steering)
            for leaf, reference in zip(leaves, jax.tree.leaves(alone.params.steering), strict=True):
                np.testing.assert_allclose(leaf, reference, atol=2e-5)
            assert trained.overlap.shape == (4, 3)
    assert done == [2] * 8
    assert len({float(alone.losses[-1]) for alone in references.values()}) == 3


def test_a_run_that_trains_the_base_is_alone(config, loaded):
    config = replace(config, plan=(), train_base=True, orthogonality=Orthogonality("none"), steps=2)
    (first,), (second,) = (train_runs(config, loaded, [Run(factor)]) for factor in (0.01, 1.0))
    assert first.losses[0] == pytest.approx(second.losses[0])
    assert first.losses[1] != second.losses[1]
    assert not first.diverged


def test_a_diverged_run_does_not_stop_the_others(config, loaded):
    config = replace(config, plan=("fixed @ block",), orthogonality=Orthogonality("none"))
    good, bad = train_runs(config, loaded, [Run(1.0), Run(float("inf"))])
    assert bad.diverged
    assert not good.diverged


def test_lofit_keeps_the_strongest_heads_and_shifts_only_them(config, loaded):
    seen = {}

    def fit(stage, stage_config, initial):
        stage_config = replace(stage_config, orthogonality=Orthogonality("none"))
        seen[stage] = train_runs(stage_config, loaded, [Run(), Run(2.0)], initial=initial)
        assert stage_config.steps == {"scale": 4, "shift": 6}[stage]
        assert stage_config.optim.lr == {"scale": 5e-3, "shift": 1e-2}[stage]
        return seen[stage]

    shifted = lofit(fit, config, 10, heads=5)
    for scaled, outcome in zip(seen["scale"], shifted, strict=True):
        scales = scaled.params.steering["lofit_scale"]["attn.heads"]["A"]
        tree = outcome.params.steering["lofit"]["attn.heads"]
        np.testing.assert_array_equal(tree["selected"], strongest_heads(scales, 5))
        moved = np.abs(tree["v"]).max(axis=-1) > 0
        np.testing.assert_array_equal(moved, tree["selected"] == 1)
        assert outcome.training.trainable == 5 * 8
    with pytest.raises(ValueError, match="stages"):
        lofit(fit, config, 1, heads=5)
    with pytest.raises(ValueError, match="cannot select 13 heads of 3 layers with 4 each"):
        lofit(fit, config, 10, heads=13)


def test_the_lofit_command_refuses_heads_before_it_trains(config, tmp_path):
    for heads in (0, 13):
        with pytest.raises(ValueError, match=f"cannot select {heads} heads: the model has 12"):
            train_lofit(replace(config, out=str(tmp_path / "run")), heads=heads)
    assert not (tmp_path / "run").exists()


def test_the_lofit_command_resumes(config, tmp_path):
    config = replace(config, orthogonality=Orthogonality("none"), steps=5, out=str(tmp_path / "run"))
    result = train_lofit(config, heads=3)
    first = (tmp_path / "run/scale/metrics.jsonl").read_text()
    assert len([line for line in first.splitlines() if '"loss"' in line]) == 2
    assert int(np.sum(result.params.steering["lofit"]["attn.heads"]["selected"])) == 3
    scaled, by = load_steering(tmp_path / "run/shift/steering.safetensors").notes["provenance"]
    assert (scaled["by"], scaled["config"]["steps"], by["by"], by["heads"]) == ("training", 2, "lofit", 3)
    with pytest.raises(ValueError, match=r"run: holds a run with other settings: run.seed is 0 there, 1 here"):
        train_lofit(replace(config, resume=True, seed=1), heads=3)
    again = train_lofit(replace(config, resume=True), heads=3)
    assert (tmp_path / "run/scale/metrics.jsonl").read_text() == first
    for a, b in zip(jax.tree.leaves(result.params.steering), jax.tree.leaves(again.params.steering), strict=True):
        np.testing.assert_array_equal(a, b)


def test_other_learning_rates_compile_nothing(config, loaded):
    """A search trains one program again and again; only a sweep of another shape is another program."""
    train_runs(config, loaded, [Run(0.5), Run(2.0)])
    before = sweep._sweep_step._cache_size()
    train_runs(config, loaded, [Run(0.1), Run(7.0)])
    assert sweep._sweep_step._cache_size() == before
