"""Benchmarks and studies refuse what cannot work before they load any weights."""

import pytest

from train.bench import decoding, eval, training
from train.theory import subjects
from train.theory.geometry import GeometryStudy
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


def test_a_study_reads_its_plan_first(config_file):
    with pytest.raises(ValueError, match="did you mean block"):
        TangentStudy(config=config_file, plan=("linear @ blok",)).measure()
