"""The studies of oracles, conversions, geometry and predictions, on a model small enough for a test."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest
from tiny_tokenizer import tiny_tokenizer

from jaxsteer import LoRA, Slot, steering_shapes
from jaxsteer.io import load_config, load_model, load_steering, sample_weights, save_hf, save_steering
from jaxsteer.types import PROJECTIONS
from train.theory.convert import ConvertStudy
from train.theory.geometry import GeometryStudy
from train.theory.oracle import OracleStudy
from train.theory.predict import PredictStudy
from train.theory.subjects import count_examples, count_tokens, read_base, read_tuned


@pytest.fixture(scope="module")
def setting(tmp_path_factory, tiny_folder, tiny_data):
    """Arguments of a study: a fine-tuning of the tiny model, and the config that it could be trained with."""
    folder = tmp_path_factory.mktemp("theory")
    plan, draw = (Slot("lora", LoRA(rank=2), PROJECTIONS),), np.random.default_rng(0)
    config = load_config(tiny_folder)
    steering = jax.tree.map(
        lambda leaf: draw.normal(0, 0.2, leaf.shape).astype(np.float32), steering_shapes(plan, config)
    )
    save_steering(folder / "lora.safetensors", steering, plan, model_name=str(tiny_folder), config=config)
    training = folder / "config.py"
    training.write_text(
        "from train.config import TrainConfig\nfrom train.tasks import JsonlTask\n\n\n"
        f"def config():\n    return TrainConfig(model={str(tiny_folder)!r}, batch_size=2, sequence_length=32, "
        f"task=JsonlTask({str(tiny_data)!r}, {str(tiny_data)!r}))\n"
    )
    return {"tuned": str(folder / "lora.safetensors"), "config": str(training)}


def result(folder, name):
    return json.loads((folder / f"{name}.json").read_text())


def examples_in(batches):
    return sum(int(np.sum(np.asarray(b.positions == 0) & np.asarray(b.segments > 0))) for b in batches)


@pytest.fixture(scope="module")
def base(setting):
    return read_base(setting["config"])


def test_examples_are_all_there_once_and_prompts_show_no_label(setting, base):
    whole, prompts = (
        base.batches("train", 20, batch_size=2, sequence_length=16, answers=answers) for answers in (True, False)
    )
    assert examples_in(whole) == count_examples(whole) == 20
    assert {b.tokens.shape for b in whole} == {(2, 16)}
    assert all(np.any(b.weights > 0) for b in whole)
    assert not any(np.any(b.weights > 0) for b in prompts)
    assert sum(int(np.sum(b.segments > 0)) for b in prompts) == 40  # two bytes each: a letter and >
    assert count_tokens(prompts) == 40
    with pytest.raises(ValueError, match=r"no such fine-tuning; make it first: python -m train.sft .*config.py"):
        read_tuned("nowhere.safetensors", base)


def test_texts_are_those_that_the_fine_tuning_saw(setting, tiny_folder, tmp_path):
    """The day that its template printed, and the same targets."""
    dated = tiny_tokenizer(
        template="{{ strftime_now('%Y-%m-%d') }}{% for m in messages %}[{{ m.role }}]{{ m.content }}<|endoftext|>"
        "{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    loaded = load_model(tiny_folder)
    save_hf(tmp_path / "dated", loaded.config, loaded.base, loaded.family, dated)
    file = load_steering(setting["tuned"])
    tuned, config = tmp_path / "lora.safetensors", tmp_path / "config.py"
    notes = {"date": "2001-02-03"}
    save_steering(tuned, file.steering, file.plan, model_name="dated", config=loaded.config, notes=notes)
    text = Path(setting["config"]).read_text().replace(str(tiny_folder), str(tmp_path / "dated"))
    config.write_text(
        text.replace("JsonlTask(", "JsonlTask(chat=True, train=")
        .replace("batch_size", "loss_on='all', batch_size")
        .replace("', '", "', validation='")
    )
    (batch,) = read_base(str(config), [str(tuned)]).batches("train", 1, batch_size=1, sequence_length=64)
    real = np.asarray(batch.segments[0]) > 0
    assert dated.decode(np.asarray(batch.tokens[0])[real]).startswith("2001-02-03[user]a>")
    assert np.sum(np.asarray(batch.weights[0]) > 0) >= sum(real) - 1


@pytest.mark.parametrize("length", [4, 9, 32])
def test_full_batches_hold_what_fits_them_whatever_the_examples_length(length, base):
    """Examples of four tokens: 1, 2 and 8 in a row."""
    batches = base.full_batches("train", 3, batch_size=2, sequence_length=length)
    assert [b.tokens.shape for b in batches] == [(2, length)] * 3
    assert count_examples(batches) == examples_in(batches) == 6 * (length // 4)
    few = base.full_batches("train", 60, batch_size=2, sequence_length=32)  # more than all of them fill
    assert count_examples(few) == 100
    assert len(few) == 7


def check_redrawn(study, folder, data):
    """Figures come from the data alone: what JSON holds draws them again."""
    again = folder / "again"
    again.mkdir()
    study.draw(data, again)
    figures = {path.name for path in folder.glob("*.png")}
    assert figures == {path.name for path in again.iterdir()}
    assert study.rows(data)


@pytest.mark.slow
def test_the_oracle_study(setting, tmp_path):
    study = OracleStudy(**setting, examples=12, batch_size=2, sequence_length=32, every=2, out=str(tmp_path))
    study.run()
    found = result(tmp_path, "oracle")
    assert found["replays"]["every block"]["kl"] < 1e-4 < found["replays"]["base"]["kl"]
    assert found["replays"]["fine-tuned"]["agreement"] == 1
    np.testing.assert_allclose(found["shares"]["whole"]["block"]["share"], 1, atol=1e-4)
    assert {path.suffix for path in tmp_path.iterdir()} == {".json", ".png"}
    check_redrawn(study, tmp_path, found)


@pytest.mark.slow
def test_conversion_then_geometry(setting, tiny_folder, tmp_path):
    config = load_config(tiny_folder)
    small = {"batch_size": 2, "sequence_length": 32, "examples": 12}
    ConvertStudy(**setting, **small, rank=2, prompts=40, distill_steps=3, out=str(tmp_path)).run()
    models = result(tmp_path, "convert")["models"]
    assert models["affine"]["kl"] < models["base"]["kl"]
    distilled = load_steering(tmp_path / "distilled.safetensors")
    assert distilled.plan[0].sites == ("block",)
    assert [step["by"] for step in distilled.provenance] == ["distill"]
    assert distilled.check_weights(sample_weights(distilled.model_name)) == ""
    steering = str(tmp_path / "linear.safetensors")
    study = GeometryStudy(**setting, **small, rank=2, steering=steering, out=str(tmp_path / "geometry"))
    study.run()
    found = result(tmp_path / "geometry", "geometry")
    assert (found["examples"], found["tokens"]) == (12, 48)
    check_redrawn(study, tmp_path / "geometry", found)
    assert {len(each) for each in found["overlap"].values()} == {config.layers}
    assert "oracle · steering writes, block" in found["mean_overlap"]
    assert max(found["effective_rank"]["LoRA at mlp.down"]) <= 2


@pytest.mark.slow
def test_the_prediction_study(setting, tmp_path):
    plan = "nonlinear(rank=3) @ {site}"
    study = PredictStudy(
        config=setting["config"], plan=plan, batches=1, batch_size=2, steps=2, every=2, out=str(tmp_path)
    )
    study.run()
    found = result(tmp_path, "predict")
    assert len(found["fall at one layer"]) == len(found["layers"]) == 2
    assert set(found["starts"]) == {"drawn D", "aligned D"}
    assert all(-1 <= each <= 1 for each in found["rank correlation over layers"].values())
    assert "promise of rank 3" in found["rank correlation over layers"]
    check_redrawn(study, tmp_path, found)
