"""Steering files and base models as commands take them: a run's folder, another base, a model that was moved."""

import json
import re
import shutil
import sys
from pathlib import Path

import jax
import pytest

from jaxsteer import init_steering, parse_plan
from jaxsteer.io import load_config, load_model, load_steering, sample_weights, save_hf, save_steering
from train import evaluate
from train.base_models import load_steered, read_steered, resolve_model
from train.config import TrainConfig
from train.evaluation.answers import ScoredAnswer, write_answers
from train.evaluation.evaluator import Evaluator
from train.robustness import RobustnessConfig, read_methods
from train.run.loop import train
from train.tasks import JsonlTask

PLAN = ("nonlinear(rank=2) @ block", "lora(rank=2) @ attn.q")


@pytest.fixture(scope="module")
def tiny(tiny_folder):
    return load_model(tiny_folder)


@pytest.fixture(scope="module")
def sibling(tiny, tmp_path_factory):
    """A model of the same config and tokenizer, with other weights."""
    folder = tmp_path_factory.mktemp("sibling") / "instruct"
    base = jax.tree.map(lambda leaf: leaf * 1.01, tiny.base)
    save_hf(folder, tiny.config, base, "llama", tiny.tokenizer)
    return folder


@pytest.fixture
def run(tiny, tiny_folder, tiny_data, tmp_path):
    """The folder of a finished run of joint adaptation."""
    folder = tmp_path / "joint"
    plan = parse_plan(PLAN, tiny.config)
    task = {"type": "JsonlTask", "train": str(tiny_data), "validation": str(tiny_data), "max_new_tokens": 4, "keys": {}}
    save_steering(
        folder / "steering.safetensors",
        init_steering(plan, tiny.config, jax.random.key(0)),
        plan,
        model_name=str(tiny_folder),
        config=tiny.config,
        notes={"config": {"task": task}},
        sample=tiny.sample,
    )
    (folder / "config.json").write_text("{}")
    return folder


def test_a_runs_folder_is_as_good_as_its_file(run):
    assert read_steered(str(run)).path == run / "steering.safetensors"
    assert read_steered("none") is None
    (name,) = read_methods(RobustnessConfig((str(run),)))
    assert name == "joint"


def test_a_folder_without_steering_says_what_to_give(tiny_folder, tmp_path):
    unfinished, full, stages = (tmp_path / name for name in ("unfinished", "full", "lofit"))
    shutil.copytree(tiny_folder, full / "model")
    for folder in (unfinished, full):
        folder.mkdir(exist_ok=True)
        (folder / "config.json").write_text('{"plan": []}')
    (other := tmp_path / "other").mkdir()
    (other / "config.json").write_text('{"model_type": "llama"}')
    (stages / "shift").mkdir(parents=True)
    (stages / "shift" / "steering.safetensors").touch()
    for folder, words in {
        unfinished: "the run has not finished, so it has no steering.safetensors yet; continue it with --resume",
        full: f"trained the model itself and has no steering; give the model: none --model {full / 'model'}",
        tiny_folder: f"a model, not a run; to use it without steering: none --model {tiny_folder}",
        stages: f"give one of {stages / 'shift'}",
        tmp_path: "no steering.safetensors there",
        other: "no steering.safetensors there",
        tmp_path / "typo": "no such file",
    }.items():
        with pytest.raises(ValueError, match=re.escape(words)):
            read_steered(str(folder))


def test_a_run_is_no_model(tmp_path):
    (tmp_path / "config.json").write_text('{"plan": [], "model": "tiny"}')
    with pytest.raises(ValueError, match="a run, not a model; give it as steering"):
        resolve_model(str(tmp_path))


def test_another_kind_of_file_is_no_damaged_steering(tiny_data):
    with pytest.raises(ValueError, match=r"letters.jsonl: not a steering file \(\*.safetensors\)"):
        read_steered(str(tiny_data))


def test_a_sibling_of_the_base_is_steered_on_purpose_only(run, sibling, tiny, capsys):
    with pytest.raises(ValueError, match="another model than this one") as error:
        load_steered(str(run), str(sibling))
    assert str(error.value).endswith("or steer this one on purpose: --other-base")
    loaded, _ = load_steered(str(run), str(sibling), other_base=True)
    assert loaded.sample.digest == sample_weights(sibling).digest
    assert "steers another model" in capsys.readouterr().err


def test_the_sample_is_of_the_stored_weights(tiny_folder, tiny):
    """Not of what is on the devices, in another dtype, int8 or sharded."""
    assert load_model(tiny_folder, dtype="bfloat16").sample.digest == tiny.sample.digest


def test_a_model_that_is_not_there_says_how_to_give_it(run, tiny, tiny_folder, tmp_path, monkeypatch):
    file = load_steering(run / "steering.safetensors")
    save = lambda name: save_steering(
        file.path, file.steering, file.plan, model_name=name, config=tiny.config, sample=tiny.sample
    )
    save("../models/mine")
    with pytest.raises(
        ValueError, match=r"steering\.safetensors: made for \.\./models/mine, which is not here"
    ) as error:
        load_steered(str(run), None)
    assert str(error.value).endswith("give its place now: --model PATH")
    # A base that was trained with the steering lies beside it, wherever both were moved.
    save("runs/old/model")
    shutil.copytree(tiny_folder, run / "model")
    loaded, _ = load_steered(str(run), None)
    assert loaded.sample.digest == tiny.sample.digest


def test_names_are_known_to_the_library(tiny_folder, tiny, run, monkeypatch):
    monkeypatch.setattr("jaxsteer.io.source.fetch_named", lambda name: tiny_folder)
    file = load_steering(run / "steering.safetensors")
    save_steering(
        file.path, file.steering, file.plan, model_name="smollm2-135m-instruct", config=tiny.config, sample=tiny.sample
    )
    name = load_steering(file.path).model_name
    assert load_config(name) == tiny.config
    assert load_model(name).sample.digest == sample_weights(name).digest == tiny.sample.digest
    with pytest.raises(ValueError, match="none of the named models"):
        load_config("smollm2")
    with pytest.raises(ValueError, match=r"\(did you mean smollm2-135m-instruct\?\)"):
        load_config("smollm-135m-instruct")


@pytest.mark.slow
def test_steering_trained_with_its_base_belongs_to_what_the_base_became(tiny_folder, tiny_data, tmp_path):
    config = TrainConfig(
        task=JsonlTask(str(tiny_data)),
        model=str(tiny_folder),
        plan=("fixed @ block",),
        train_base=True,
        steps=1,
        batch_size=4,
        sequence_length=16,
        test_examples=0,
        out=str(tmp_path / "run"),
    )
    train(config)
    file = read_steered(config.out)
    assert Path(file.model_name) == tmp_path / "run" / "model"
    assert file.check_weights(sample_weights(file.model_name)) == ""
    with pytest.raises(ValueError, match="another model"):
        load_steered(config.out, str(tiny_folder))


def test_every_part_is_compared(run, tmp_path, monkeypatch, capsys):
    """One line, and one entry of the summary, for each part: each with its own answers there."""
    right = {}

    def answer(self, examples, params, path, **_):
        prompts = self.prompts(examples)
        answers = [
            ScoredAnswer(text, "", "", prompt.answer, number < right[path.stem], False, prompt.source)
            for number, (prompt, text) in enumerate(zip(prompts.tokens, prompts.texts, strict=True))
        ]
        write_answers(path, answers)
        return answers

    def run_it(*options):
        command = ["evaluate", str(run), "--examples", "8", "--split", "validation", *options]
        monkeypatch.setattr(sys, "argv", [*command, "--parts", "all", "lora_only", "steering_only"])
        evaluate.main()
        return [line for line in capsys.readouterr().out.splitlines() if "against" in line]

    monkeypatch.setattr(Evaluator, "answer", answer)
    right |= {"base": 1, "steered": 8, "lora_only": 4, "steering_only": 8}
    assert run_it("--out", str(tmp_path / "there")) == []
    right |= {"steered": 8, "lora_only": 6, "steering_only": 4}
    lines = run_it("--against", str(tmp_path / "there"))
    assert [line.split()[0] for line in lines] == ["steered", "lora_only", "steering_only"]
    summary = json.loads((run / "evaluation" / "summary.json").read_text())  # in the run's folder by default
    differences = {name: part["against"]["difference"] for name, part in summary.items() if "against" in str(part)}
    assert differences == {"steered": 0.0, "lora_only": 0.25, "steering_only": -0.5}
