"""Neutral text beside the examples: what it does to a run, to its batches, and to runs of a comparison."""

from dataclasses import replace

import jax
import numpy as np
import pytest

from jaxsteer.io import load_model
from jaxsteer.optim import OptimConfig
from train.compare.sweep import Run, train_runs
from train.config import TrainConfig
from train.config.dpo import DpoConfig
from train.config.run import KeepConfig
from train.run.algorithm import SFT
from train.run.loop import train
from train.run.metrics import read_metrics
from train.run.training import make_training, read_data
from train.tasks import JsonlTask

pytestmark = pytest.mark.xdist_group("keeping")


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    path = tmp_path_factory.mktemp("neutral") / "neutral.txt"
    path.write_text("the river rises\nbread needs water\n\nsome days are long\n")
    return str(path)


@pytest.fixture(scope="module")
def config(tiny_folder, tiny_data, texts):
    return TrainConfig(
        task=JsonlTask(str(tiny_data), max_new_tokens=2),
        model=str(tiny_folder),
        plan=("nonlinear(rank=4) @ block",),
        optim=OptimConfig(lr=1e-1),
        keep=KeepConfig(weight=1000.0, texts=texts, length=16),
        steps=8,
        batch_size=4,
        sequence_length=32,
        grad_accumulation=2,
        test_examples=0,
    )


@pytest.fixture(scope="module")
def kept(config, tmp_path_factory):
    """The metrics of a run."""
    run = train(replace(config, out=str(tmp_path_factory.mktemp("kept") / "run"))).run
    return [row for row in read_metrics(run.metrics) if "loss" in row]


def test_a_run_moves_neutral_text_less(config, kept, tmp_path):
    lightly = replace(config, keep=replace(config.keep, weight=1e-6), out=str(tmp_path / "run"))
    free = [row for row in read_metrics(train(lightly).run.metrics) if "loss" in row]
    assert kept[0]["neutral_kl"] == pytest.approx(0, abs=1e-6)
    assert kept[-1]["neutral_kl"] < 0.5 * free[-1]["neutral_kl"]
    assert free[-1]["loss"] < free[0]["loss"]


def test_runs_together_are_runs_alone(config, kept):
    loaded = load_model(config.model)
    first, other = train_runs(config, loaded, [Run(), Run(factor=0.5)])
    np.testing.assert_allclose(first.losses, [row["loss"] for row in kept], rtol=1e-4)
    assert not np.allclose(first.losses, other.losses)


def test_batches_are_a_function_of_the_step(config):
    source = read_data(config, load_model(config.model)).source
    batch, again = source.batch(5), source.batch(5, [1, 3])
    for one, other in zip(jax.tree.leaves(batch), jax.tree.leaves(again), strict=True):
        np.testing.assert_array_equal(np.asarray(one)[[1, 3]], other)
    assert batch.neutral.tokens.shape == (4, 16)
    assert (batch.neutral.weights.sum(axis=1) > 0).all()
    seen = {row.tobytes() for step in range(3) for row in np.asarray(source.batch(step).neutral.tokens)}
    assert len(seen) == 3
    assert source.ordered_by(1).digest() == source.digest()
    assert replace(source, neutral=source.neutral[:2]).digest() != source.digest()


def test_the_base_may_train(config):
    training = make_training(replace(config, train_base=True, plan=()), load_model(config.model))
    training = replace(training, given=SFT.given(training))
    state, before = training.step(training.state, training.batch(0))
    state, after = training.step(state, training.batch(1))
    assert float(before.facts["neutral_kl"]) == pytest.approx(0, abs=1e-6)
    assert float(after.facts["neutral_kl"]) > 0


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"weight": -1.0}, "--keep.weight must be at least 0"),
        ({"weight": 1.0}, "--keep.weight 1 needs neutral text: --keep.texts FILE"),
        ({"length": 3}, "--keep.length must be at least 4"),
    ],
)
def test_settings_that_keep_nothing(settings, said):
    with pytest.raises(ValueError, match=said):
        KeepConfig(**settings)


def test_what_cannot_be_kept(config, tmp_path):
    with pytest.raises(ValueError, match=r"--keep\.weight is for jaxsteer sft; jaxsteer dpo"):
        DpoConfig(keep=config.keep)
    with pytest.raises(ValueError, match="--train-examples is for jaxsteer sft; jaxsteer dpo"):
        DpoConfig(train_examples=10)
    (tmp_path / "short.txt").write_text("a\nb\n")
    short = replace(config.keep, texts=str(tmp_path / "short.txt"))
    with pytest.raises(ValueError, match="need at least 2 texts of 4 tokens or more"):
        train(replace(config, keep=short, out=str(tmp_path / "run")))
    with pytest.raises(ValueError, match=r"nowhere\.txt"):
        train(replace(config, keep=replace(short, texts="nowhere.txt"), out=str(tmp_path / "run")))
