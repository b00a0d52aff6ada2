"""Training end to end on a tiny model: what a run leaves behind, resuming after a kill, and bad input."""

import importlib
import json
import random
import shutil
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxsteer.io import load_model, load_steering
from jaxsteer.optim import OptimConfig
from train.cli import run_main
from train.config import TrainConfig
from train.evaluation.evaluator import Evaluator, Validation
from train.evaluation.journal import FileJournal
from train.evaluation.loss import Loss
from train.report.page import make_page
from train.run import training as setup
from train.run.folder import read_inputs
from train.run.loop import train
from train.run.metrics import read_metrics
from train.tasks import JsonlTask

ROOT = Path(__file__).parents[2]
SHARED = pytest.mark.xdist_group("sft")  # the tests share a finished run


@pytest.fixture(scope="module")
def settings(tiny_folder, tiny_data):
    """What the runs have in common: tests that keep its steps and shapes share its compiled step."""
    return TrainConfig(
        task=JsonlTask(str(tiny_data), validation=str(tiny_data), max_new_tokens=2),
        model=str(tiny_folder),
        plan=("nonlinear(rank=4) @ block", "lora(rank=2) @ attn.q,mlp.down layers=last:2"),
        optim=OptimConfig(lr=1e-2),
        steps=12,
        batch_size=4,
        sequence_length=32,
        grad_accumulation=2,
        evaluate_every=6,
        validation_examples=8,
        test_examples=16,
        eval_batch_size=8,
        checkpoint_every=4,
    )


@pytest.fixture
def config(settings, tmp_path):
    return replace(settings, out=str(tmp_path / "run"))


@pytest.fixture
def bare(config):
    """Without evaluations, and with one checkpoint at the end."""
    return replace(config, evaluate_every=0, test_examples=0, checkpoint_every=config.steps)


@pytest.fixture(scope="module")
def finished(settings, tmp_path_factory):
    """A whole run, for tests that only read it."""
    return train(replace(settings, out=str(tmp_path_factory.mktemp("finished") / "run")))


def leaves(path):
    return jax.tree.leaves(load_steering(path).steering)


@SHARED
def test_a_run_leaves_what_it_promises(config, finished):
    run = finished.run
    rows = read_metrics(run.metrics)
    losses = [row["loss"] for row in rows if "loss" in row]
    assert len(losses) == 12
    assert losses[-1] < losses[0]
    assert [row["step"] for row in rows if "accuracy" in row] == [0, 6, 12]
    summary = json.loads(run.summary.read_text())
    assert set(summary) == {
        "accuracy_before", "accuracy_after", "trainable_parameters", "trainable_share", "seconds",
        "data_wait_seconds", "tokens_per_second", "peak_memory_bytes", "step", "finished", "validation",
    }  # fmt: skip
    evaluated = {row["step"]: row for row in rows if "validation_loss" in row}
    for stage, step in (("before", 0), ("after", 12)):
        figures, row = summary["validation"][stage], evaluated[step]
        assert (figures["loss"], figures["accuracy"]) == (row["validation_loss"], row["accuracy"])
        assert row["perplexity"] == pytest.approx(np.exp(row["validation_loss"]))
        assert 0 <= row["token_accuracy"] <= 1
    shown = read_metrics(run.answers_during)
    assert [row["step"] for row in shown] == [0] * 3 + [6] * 3 + [12] * 3
    low, high = summary["accuracy_after"]["interval"]
    assert 0 <= low <= summary["accuracy_after"]["value"] <= high <= 1
    assert run.plot.stat().st_size > 10_000
    assert len((run.folder / "answers_before.jsonl").read_text().splitlines()) == 16
    # 3 layers of D and U [4, 32], and in the last 2 layers A and B of the query (32 -> 32) and down (48 -> 32) maps.
    assert summary["trainable_parameters"] == 3 * 2 * 4 * 32 + 2 * 2 * (32 + 32 + 48 + 32)
    file = load_steering(run.steering)
    file.check(load_model(config.model).config)
    assert [slot.name for slot in file.plan] == ["nonlinear", "lora"]
    assert file.notes["template"] == "{prompt}"
    (start,) = [json.loads(line) for line in run.starts.read_text().splitlines()]
    assert (start["done"], start["steps"], start["trainable"]) == (0, 12, summary["trainable_parameters"])
    page = make_page([str(run.folder)], 50)
    assert "16 of 16 test questions" in page
    assert 'class="problem"' not in page


def test_patience_ends_a_run_and_keeps_the_best(config, monkeypatch):
    rates, seen = iter([2, 5, 4, 3, 9]), []  # tenths; the first is the untouched model's

    def validate(self, params):
        seen.append(jax.device_get(params.steering))
        loss = {"validation_loss": 1.0, "perplexity": np.e, "token_accuracy": 0.5}
        return Validation({**loss, "accuracy": next(rates) / 10, "low": 0.0, "high": 1.0}, [])

    monkeypatch.setattr(Evaluator, "validate", validate)
    ended = train(replace(config, evaluate_every=2, patience=2, test_examples=0, checkpoint_every=100))
    assert [row["step"] for row in read_metrics(ended.run.metrics) if "loss" in row] == [1, 2, 3, 4, 5, 6]
    for kept, best, last in zip(leaves(ended.run.steering), *map(jax.tree.leaves, (seen[1], seen[3])), strict=True):
        np.testing.assert_array_equal(kept, best)
        assert np.any(kept != last)


def test_the_validation_loss_selects_and_stops(config, monkeypatch):
    """No answers are generated; the smallest loss is the best, and its checkpoint is kept."""
    losses, seen = iter([3.0, 2.0, 2.5, 2.2]), []

    def loss(self, split, params):
        seen.append(jax.device_get(params.steering))
        return Loss(next(losses), 0.5, 100)

    monkeypatch.setattr(Evaluator, "loss", loss)
    monkeypatch.setattr(Evaluator, "_ask", lambda *rest: pytest.fail("an answer was generated"))
    config = replace(config, select_by="validation_loss", evaluate_every=1, patience=2, show_answers=0)
    ended = train(replace(config, test_examples=0))
    rows = [row for row in read_metrics(ended.run.metrics) if "validation_loss" in row]
    assert [(row["step"], row["validation_loss"]) for row in rows] == [(0, 3.0), (1, 2.0), (2, 2.5), (3, 2.2)]
    for kept, best in zip(leaves(ended.run.steering), jax.tree.leaves(seen[1]), strict=True):
        np.testing.assert_array_equal(kept, best)


def test_free_text_has_a_signal_without_validation_data(config, tmp_path, capsys):
    """The loss on examples held out decides; a few answers are shown, none is marked."""
    path = tmp_path / "free.jsonl"
    rows = [{"prompt": f"{i}", "completion": "so it goes on and on"} for i in range(20)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = JsonlTask(str(path), max_new_tokens=2)
    ended = train(replace(config, task=task, validation_share=0.1, show_answers=1, patience=2))
    losses = {row["step"]: row["validation_loss"] for row in read_metrics(ended.run.metrics) if "token_accuracy" in row}
    assert list(losses) == [0, 6, 12]
    assert losses[12] < losses[6] < losses[0]
    summary = json.loads(ended.run.summary.read_text())
    assert summary["validation"]["after"]["loss"] == losses[12]
    assert summary["test"]["after"]["loss"] == pytest.approx(losses[12], rel=1e-5)  # the same examples
    assert summary["accuracy_after"] is None
    assert [row["step"] for row in read_metrics(ended.run.answers_during)] == [0, 6, 12]
    assert f"step 12: validation loss {losses[12]:.4f} (perplexity" in capsys.readouterr().out


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_killed_evaluation_resumes_with_its_run(config, when, monkeypatch):
    """Five answers are known when the process dies; the resumed run asks for the others alone."""
    add, asked, dying = FileJournal.add, [], [True]

    def adding(self, index, answer):
        if when in self.path.name:
            if dying[0] and len(asked) == 5:
                raise KeyboardInterrupt
            asked.append(index)
        add(self, index, answer)

    monkeypatch.setattr(FileJournal, "add", adding)
    config = replace(config, evaluate_every=0, checkpoint_every=config.steps)
    with pytest.raises(KeyboardInterrupt):
        train(config)
    dying[0] = False
    result = train(replace(config, resume=True))
    assert sorted(asked) == list(range(16))
    assert len(result.before) == len(result.after) == 16
    assert not list(result.run.folder.glob("*.unfinished"))


def test_full_fine_tuning_writes_a_model(config, tmp_path):
    folder = shutil.copytree(config.model, tmp_path / "instruct")
    settings = {"eos_token_id": [0, 2, 258], "temperature": 0.6, "do_sample": True}
    (folder / "generation_config.json").write_text(json.dumps(settings))
    config = replace(config, plan=(), train_base=True, optim=OptimConfig(lr=1e-3), steps=2, evaluate_every=0)
    result = train(replace(config, model=str(folder)))
    after, before = load_model(result.run.folder / "model"), load_model(folder)
    assert (after.stop_tokens, after.generation, after.config) == ((0, 2, 258), settings, before.config)
    assert after.require_tokenizer().chat_template == before.require_tokenizer().chat_template
    tuned, base = after.base, before.base
    assert any(
        np.any(np.asarray(a) != np.asarray(b)) for a, b in zip(*map(jax.tree.leaves, (tuned, base)), strict=True)
    )
    assert not result.run.steering.exists()
    made = json.loads((result.run.folder / "model" / "jaxsteer.json").read_text())
    assert (made["by"], made["base"], made["base_weights"]) == ("training", str(folder), before.sample.digest)
    assert made["config"]["steps"] == 2
    assert made["inputs"]["train"] == read_inputs(result.run)["train"]


CONFIG = """
from train.config import TrainConfig
from train.tasks import JsonlTask
from jaxsteer.optim import OptimConfig

def config():
    return TrainConfig(task=JsonlTask({data!r}), model={model!r}, plan=("nonlinear(rank=4) @ block",), steps=400,
                       batch_size=4, sequence_length=32, optim=OptimConfig(lr=3e-3), test_examples=0,
                       checkpoint_every=5)
"""


@pytest.mark.slow
def test_killed_three_times_and_resumed_is_bitwise_the_same(tiny_folder, tiny_data, tmp_path):
    file = tmp_path / "config.py"
    file.write_text(CONFIG.format(data=str(tiny_data), model=str(tiny_folder)))
    command = [sys.executable, "-m", "train.sft", str(file), "--out"]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    reference = subprocess.Popen([*command, str(whole)], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)

    moments = random.Random(time.time_ns())
    resume: list[str] = []
    for kill in range(3):
        process = subprocess.Popen([*command, str(killed), *resume], cwd=ROOT, stdout=subprocess.PIPE, text=True)
        wanted = 100 * kill + moments.randrange(40, 100)
        metrics = killed / "metrics.jsonl"
        while process.poll() is None:
            if metrics.exists() and metrics.read_bytes().count(b"\n") >= wanted:
                process.send_signal(signal.SIGKILL)
                break
            time.sleep(0.001)
        output, _ = process.communicate()
        assert process.returncode == -signal.SIGKILL, output
        if resume:
            assert int(output.split("Restored step ")[1].split(".")[0]) > 0
        resume = ["--resume"]
    done = subprocess.run([*command, str(killed), *resume], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split("Restored step ")[1].split(".")[0]) > 200
    output, _ = reference.communicate()
    assert reference.returncode == 0, output
    for one, other in zip(leaves(whole / "steering.safetensors"), leaves(killed / "steering.safetensors"), strict=True):
        np.testing.assert_array_equal(np.asarray(one), np.asarray(other))
    losses = lambda run: [row["loss"] for row in read_metrics(run / "metrics.jsonl")]
    assert losses(whole) == losses(killed)


@SHARED
def test_stopping_is_saving(config, finished, monkeypatch):
    """SIGTERM: the step under way is finished and saved, and the resumed run ends where the other does."""

    def stepping(*args):
        if args[2] == 6:
            signal.raise_signal(signal.SIGTERM)
        return original(*args)

    original = setup.step_batch
    monkeypatch.setattr(setup, "step_batch", stepping)
    assert train(config) is None
    monkeypatch.undo()
    assert not (Path(config.out) / "summary.json").exists()
    resumed = train(replace(config, resume=True))
    starts = [json.loads(line) for line in resumed.run.starts.read_text().splitlines()]
    assert starts[-1]["done"] > 0
    assert "resumed once, from step" in make_page([str(resumed.run.folder)], 5)
    for one, other in zip(leaves(finished.run.steering), leaves(resumed.run.steering), strict=True):
        np.testing.assert_array_equal(np.asarray(one), np.asarray(other))


def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_good_checkpoint(config, monkeypatch):
    def poisoned(config, data, step, own):
        batch = original(config, data, step, own)
        return batch._replace(weights=batch.weights * np.nan) if step == 9 else batch

    original = setup.step_batch
    monkeypatch.setattr(setup, "step_batch", poisoned)
    config = replace(config, evaluate_every=0, test_examples=0)
    with pytest.raises(FloatingPointError, match=r"step 10: .*last good checkpoint is step 8"):
        train(config)
    monkeypatch.undo()
    assert train(replace(config, resume=True)) is not None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "no/such/folder/here"}, "no/such/folder/here"),
        ({"plan": ("nonlinear(rank=4) @ blok",)}, "blok"),
        ({"plan": ("steer(rank=4) @ block",)}, "unknown method 'steer'"),
        ({"plan": ("nonlinear(rank=0) @ block",)}, "rank 0"),
        ({"plan": ("nonlinear(rank=33) @ block",)}, "rank 33 .* between 1 and 32"),
        ({"plan": ("nonlinear(ranks=4) @ block",)}, "ranks=4"),
        ({"plan": ("nonlinear @ block layers=2-3",)}, "layers 0 to 2"),
        ({"plan": ("lora @ block",)}, "lora is a weight method"),
        ({"plan": ("nonlinear block",)}, "expected method"),
        ({"freeze": ("steer",)}, "cannot freeze"),
        ({"sequence_length": 3}, "longer than 3 tokens .*letters.jsonl:1"),
    ],
)
def test_bad_settings_are_named_before_anything_is_trained(config, changes, message):
    with pytest.raises(ValueError, match=message):
        train(replace(config, **changes))
    assert not (Path(config.out) / "metrics.jsonl").exists()


def test_bad_data_is_named(bare, tmp_path):
    path = tmp_path / "bad.jsonl"
    for text, message in (
        ('{"prompt": "a", "completion": "b"}\n{"prompt": "a"}\n', r"bad.jsonl:2"),
        ("{\n", r"bad.jsonl:1"),
        ("", r"bad.jsonl"),
    ):
        path.write_text(text)
        with pytest.raises(ValueError, match=message):
            train(replace(bare, task=JsonlTask(str(path)), out=str(tmp_path / f"run{len(text)}")))


def test_long_examples_are_dropped_only_when_asked_and_then_reported(bare, tmp_path, capsys):
    path = tmp_path / "long.jsonl"
    rows = [{"prompt": "a" * n, "completion": "b"} for n in (5, 40, 6)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = replace(bare, task=JsonlTask(str(path)))
    with pytest.raises(ValueError, match=r"long.jsonl:2"):
        train(config)
    train(replace(config, on_long="drop", out=config.out + "-drop"))
    printed = capsys.readouterr().out
    assert "2 examples" in printed
    assert "long.jsonl:2" in printed


@SHARED
def test_an_output_folder_with_another_run_is_refused(config, finished):
    config = replace(config, out=str(finished.run.folder))
    with pytest.raises(ValueError, match=r"steps"):
        train(replace(config, steps=1))
    with pytest.raises(ValueError, match=r"--resume"):
        train(config)


@pytest.fixture
def run(monkeypatch, capsys):
    """Runs a command as its own process would; gives what it prints."""

    def call(module, *arguments, fails=False):
        monkeypatch.setattr(sys, "argv", [module, *arguments])
        capsys.readouterr()
        with pytest.raises(SystemExit) if fails else nullcontext() as exit:
            run_main(importlib.import_module(module).main)
        printed = capsys.readouterr()
        assert not fails or exit.value.code == 1
        return printed.err if fails else printed.out

    return call


def test_a_command_of_its_own_process():
    done = subprocess.run([sys.executable, "-m", "train.generate", "none"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.startswith("error: no prompts")
    assert "Traceback" not in done.stderr


@SHARED
def test_the_other_programs(config, finished, run):
    steering = str(finished.run.steering)
    assert "b>" in run("train.generate", steering, "b>", "c>", "--compare")
    assert "‖Δh‖" in run("train.inspect", steering, "--prompt", "abc")
    assert (finished.run.folder / "shift.png").exists()
    small = (str(ROOT / "configs/listops_smollm2.py"), "--model", config.model)
    assert "attention on these devices: rows (one CPU device" in run("train.inspect", *small)
    assert "steered" in run("train.evaluate", steering, "--examples", "8")
    answers = (finished.run.folder / "evaluation" / "steered.jsonl").read_text().splitlines()
    assert len(answers) == 8
    assert set(json.loads(answers[0])) >= {"prompt", "output", "extracted", "gold", "correct", "truncated"}
    assert "no such file" in run("train.generate", "missing.safetensors", "x", fails=True)
    assert "error:" in run("train.sft", str(ROOT / "configs/listops_smollm2.py"), "--plan", "nothing", fails=True)


def test_one_trace_serves_every_step(config):
    from train.base_models import load
    from train.run.training import make_training, step_batch

    training = make_training(config, load(config.model))
    state = training.state
    for k in range(3):
        state, _ = training.step(state, step_batch(config, training.data, k))
    assert training.program.jitted._cache_size() == 1
