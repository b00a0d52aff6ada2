"""A run on an int8 base, from its config to the answers of its steering file."""

import jax
import numpy as np
import pytest

from jaxsteer.models.quantise import is_quantised
from train.base_models import load_steered
from train.config import TrainConfig
from train.run.loop import train
from train.run.metrics import read_metrics
from train.tasks import JsonlTask


def test_steering_keeps_to_the_base_that_it_was_trained_on(tiny_folder, tiny_data, tmp_path):
    config = TrainConfig(
        task=JsonlTask(str(tiny_data)),
        model=str(tiny_folder),
        plan=("nonlinear(rank=4) @ block",),
        quantise="int8",
        steps=2,
        batch_size=4,
        sequence_length=32,
        test_examples=0,
        out=str(tmp_path / "run"),
    )
    result = train(config)
    assert is_quantised(result.params.base)
    assert np.isfinite([row["loss"] for row in read_metrics(result.run.metrics)]).all()
    loaded, _ = load_steered(str(result.run.steering), None)
    jax.tree.map(np.testing.assert_array_equal, loaded.base, result.params.base)
    with pytest.raises(ValueError, match="an int8 base cannot be trained itself"):
        TrainConfig(quantise="int8", train_base=True)
