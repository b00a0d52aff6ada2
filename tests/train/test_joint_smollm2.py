"""Joint adaptation of a real model on a real task: what the penalty does to the overlap."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from jaxsteer.orthogonality import Orthogonality
from train.base_models import load
from train.cli import load_config_file
from train.compare.config import CompareConfig
from train.compare.sweep import Run, train_runs

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_the_penalty_holds_the_overlap_far_below_chance_on_smollm2():
    comparison = load_config_file(ROOT / "configs" / "compare_listops.py", CompareConfig)
    entry = next(entry for entry in comparison.entries if entry.name == "joint, penalty")
    config = replace(comparison.train_config(entry), steps=50)
    loaded = load(config.model, "float32")
    held = train_runs(config, loaded, [Run()])[0]
    free = train_runs(replace(config, orthogonality=Orthogonality("none")), loaded, [Run()])[0]
    chance = 8 / loaded.config.width
    print(f"overlap: with the penalty {held.overlap[-1].mean():.2g}, without {free.overlap[-1].mean():.2g}")
    assert held.overlap[-1].mean() <= 0.1 * chance
    assert free.overlap[-1].mean() > chance
    assert np.mean(held.losses[-10:]) < np.mean(held.losses[:10]) / 2
