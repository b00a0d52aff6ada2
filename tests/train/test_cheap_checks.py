"""Benchmarks and studies refuse what cannot work before they load any weights."""

from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxsteer import LoRA, Slot, steering_shapes
from jaxsteer.io import load_config, sample_weights, save_steering
from train.bench import decoding, eval, training
from train.theory import subjects
from train.theory.geometry import GeometryStudy
from train.theory.predict import PredictStudy
from train.theory.tangent import TangentStudy

BENCHES = [
    (decoding, decoding.bench_decode, decoding.DecodeBench),
    (eval, eval.bench_eval, eval.EvalBench),
    (training, training.bench_train, training.TrainBench),
]


@pytest.fixture(autouse=True)
def nothing_is_loaded(monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("weights were loaded")

    for module in (decoding, eval, training, subjects):
        monkeypatch.setattr(module, "load", refuse)


@pytest.mark.parametrize(("module", "bench", "config"), BENCHES, ids=lambda value: getattr(value, "__name__", ""))
def test_a_benchmark_reads_its_plan_first(module, bench, config, tiny_folder):
    with pytest.raises(ValueError, match="did you mean block"):
        bench(config(model=str(tiny_folder), plan=("linear @ blok",)))
    with pytest.raises(ValueError, match="rank"):
        bench(config(model=str(tiny_folder), plan=("linear(rank=1000) @ block",)))


@pytest.fixture
def config_file(tmp_path, tiny_folder):
    path = tmp_path / "config.py"
    path.write_text(
        f"from train.config import TrainConfig\ndef config(): return TrainConfig(model={str(tiny_folder)!r})\n"
    )
    return str(path)


def test_a_study_looks_for_its_fine_tuning_first(config_file):
    with pytest.raises(ValueError, match=r"absent\.safetensors: no such fine-tuning; make it first"):
        GeometryStudy(config=config_file, tuned="absent.safetensors").measure()


def test_a_study_reads_its_plan_first(config_file, tmp_path):
    with pytest.raises(ValueError, match="did you mean block"):
        TangentStudy(config=config_file, plan=("linear @ blok",)).measure()
    own = tmp_path / "own.py"
    own.write_text(Path(config_file).read_text().replace("TrainConfig(", "TrainConfig(plan=('linear @ blok',), "))
    with pytest.raises(ValueError, match="did you mean block"):
        TangentStudy(config=str(own)).measure()


def test_a_study_reads_its_task_first(config_file, tmp_path):
    own = tmp_path / "own.py"
    task = "task=JsonlTask('absent.jsonl', 'absent.jsonl'), "
    text = Path(config_file).read_text().replace("TrainConfig(", f"TrainConfig({task}")
    own.write_text("from train.tasks import JsonlTask\n" + text)
    with pytest.raises(ValueError, match=r"absent\.jsonl: no such file"):
        TangentStudy(config=str(own)).measure()
    with pytest.raises(ValueError, match=r"absent\.jsonl: no such file"):
        PredictStudy(config=str(own)).measure()


def test_a_study_wants_the_model_that_its_fine_tuning_began_with(config_file, tiny_folder, tmp_path):
    """And names no option that studies do not have."""
    config, plan = load_config(tiny_folder), (Slot("lora", LoRA(rank=2), ("attn.q",)),)
    zeros = jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), steering_shapes(plan, config))
    sample = sample_weights(tiny_folder)
    moved = tuple(block._replace(values=1.5 * block.values) for block in sample.blocks)
    other = replace(sample, digest="0" * 64, blocks=moved)
    file = tmp_path / "lora.safetensors"
    save_steering(file, zeros, plan, model_name="another", config=config, sample=other)
    with pytest.raises(ValueError, match="made for another, which is another model than this one") as error:
        GeometryStudy(config=config_file, tuned=str(file)).measure()
    assert "--" not in str(error.value)
    assert "began with" in str(error.value)
