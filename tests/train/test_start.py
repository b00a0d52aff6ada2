"""The start of a run: what is refused before weights are read, what a failure leaves, and what a run may go on with."""

import json
import os
import shutil
import sys
from dataclasses import replace
from datetime import date
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxsteer.io import load_steering, save_hf
from jaxsteer.models.transformer import init_base
from jaxsteer.optim import OptimConfig
from train import lofit, quickstart, sft
from train.cli import from_command_line
from train.compare import __main__ as comparison
from train.compare.config import CompareConfig, Entry, LoFiT, Method
from train.config import TrainConfig
from train.run import loop, start
from train.run.checkpoints import open_checkpoints
from train.run.folder import RunFolder, read_history
from train.run.metrics import read_metrics
from train.run.preview import shown
from train.run.start import prepare
from train.run.starts import read_starts
from train.run.training import Training
from train.tasks import JsonlTask, TableTask


@pytest.fixture(scope="module")
def settings(tiny_folder, tiny_data):
    return TrainConfig(
        task=JsonlTask(str(tiny_data)),
        model=str(tiny_folder),
        plan=("fixed @ block",),
        optim=OptimConfig(lr=1e-2, schedule="constant", warmup=0.0),
        steps=2,
        batch_size=4,
        sequence_length=32,
        test_examples=0,
        checkpoint_every=1,
    )


@pytest.fixture
def config(settings, tmp_path):
    return replace(settings, out=str(tmp_path / "deep" / "run"))


@pytest.fixture(scope="module")
def finished(settings, tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished") / "run"
    loop.train(replace(settings, out=str(folder)))
    return folder


@pytest.fixture
def run(config, finished):
    """A copy of the finished run."""
    return Path(shutil.copytree(finished, config.out))


@pytest.fixture
def weights(monkeypatch):
    """Fails if weights are read."""
    for module in (start, comparison):
        monkeypatch.setattr(module, "load_base_model", lambda *rest: pytest.fail("weights were read"))


WRONG = [
    ({"plan": ("fixed @ blok",)}, "blok"),
    ({"plan": ("nonlinear(rank=33) @ block",)}, "rank 33"),
    ({"freeze": ("fixed",)}, "nothing to train"),
    ({"task": JsonlTask("missing.jsonl")}, "missing.jsonl"),
    ({"evaluate_every": 1, "task": JsonlTask("{data}", validation="missing.jsonl")}, "missing.jsonl"),
    ({"test_examples": 4, "task": JsonlTask("{data}", test="missing.jsonl")}, "missing.jsonl"),
    ({"task": TableTask(train="{data}", prompt="{question}", completion="{completion}")}, "question"),
    ({"sequence_length": 3}, "longer than 3 tokens"),
    ({"profile": "2:9"}, "this run does steps 1 to 2"),
    ({"checkpoints": "hdfs://a/b"}, "cannot be reached"),
    ({"checkpoints": "{data}/c"}, "is a file, not a folder"),
    ({"start_from": "missing"}, "--start-from missing: no such file or folder"),
    ({"resume": True}, "no run to resume"),
]


@pytest.mark.parametrize(("changes", "message"), WRONG, ids=str)
def test_cheap_checks_come_before_the_weights(config, tiny_data, tmp_path, weights, changes, message):
    fill = lambda value: value.replace("{data}", str(tiny_data)) if isinstance(value, str) else value
    if "task" in changes:
        changes = changes | {"task": replace(changes["task"], **{
            name: fill(getattr(changes["task"], name)) for name in ("train", "validation", "test")
        })}  # fmt: skip
    wrong = replace(config, **{name: fill(value) for name, value in changes.items()})
    for command in (loop.train, loop.preview):
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            command(wrong)
        assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"entries": (Entry("one", Method(("fixed @ blok",)), 1e-2),)}, "one: .*blok"),
        (
            {"entries": (Entry("two", Method(("lofit @ attn.heads",)), 1e-2, lofit=LoFiT(13)),)},
            "cannot select 13 heads",
        ),
        ({"test_examples": 0}, "has no test examples"),
    ],
)
def test_a_comparison_checks_before_the_weights(config, tiny_data, tmp_path, weights, changes, message):
    task = JsonlTask(str(tiny_data), validation=str(tiny_data))
    base = replace(
        config, task=task, plan=TrainConfig.plan, test_examples=changes.get("test_examples", 4), out=TrainConfig.out
    )
    entries = changes.get("entries", (Entry("one", Method(("fixed @ block",)), 1e-2),))
    with pytest.raises(ValueError, match=message):
        comparison.compare(CompareConfig(base=base, entries=entries, out=config.out))
    assert list(tmp_path.iterdir()) == []


def test_a_comparison_notices_other_data(config, tiny_data, tmp_path, monkeypatch):
    data = Path(shutil.copy(tiny_data, tmp_path / "data.jsonl"))
    task = JsonlTask(str(data), validation=str(data))
    base = replace(config, task=task, plan=TrainConfig.plan, test_examples=4, out=TrainConfig.out)
    settings = CompareConfig(base=base, entries=(Entry("one", Method(("fixed @ block",)), 1e-2),), out=config.out)

    def stopped(config):
        (Path(settings.out) / "runs").mkdir()  # something is finished
        raise KeyboardInterrupt

    monkeypatch.setattr(comparison, "load_base_model", stopped)
    with pytest.raises(KeyboardInterrupt):
        comparison.compare(settings)
    data.write_text("".join(data.read_text().splitlines(keepends=True)[:50]))
    with pytest.raises(ValueError, match=r"its training data .*100 examples .* now has 50 .* its validation examples"):
        comparison.compare(settings)


@pytest.mark.parametrize(
    ("changes", "share", "message"),
    [
        ({"steps": 1}, 0.4, "leaves one of its two stages"),
        ({"task": JsonlTask("missing.jsonl"), "steps": None}, 0.4, "missing.jsonl"),
        ({"start_from": "x"}, 0.4, "--start-from and --extend have no effect"),
    ],
)
def test_lofit_checks_before_the_weights(config, tmp_path, weights, changes, share, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        lofit.train_lofit(replace(config, **changes), heads=3, share=share)
    assert list(tmp_path.iterdir()) == []


# ---- a start that fails


@pytest.mark.parametrize("error", [KeyboardInterrupt(), ValueError("damaged")])
def test_a_failed_start_leaves_nothing(config, tmp_path, monkeypatch, error):
    def fail(*rest):
        assert {".lock", "config.json", "inputs.json"} <= set(os.listdir(config.out))
        raise error

    monkeypatch.setattr(start, "load_base_model", fail)
    with pytest.raises(type(error)):
        loop.train(config)
    assert list(tmp_path.iterdir()) == []


def test_a_refused_folder_keeps_no_lock(config):
    folder = Path(config.out)
    folder.mkdir(parents=True)
    (folder / "thesis.tex").write_text("x")
    with pytest.raises(ValueError, match="neither empty nor a run"):
        loop.train(config)
    assert os.listdir(folder) == ["thesis.tex"]


def test_too_little_memory_is_advice_and_leaves_nothing(config, tmp_path, monkeypatch):
    def fail(*rest):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 108020520000 bytes.")

    monkeypatch.setattr(Training, "step", fail)
    with pytest.raises(ValueError, match=r"out of memory: .* --grad-accumulation .* --sequence-length .*108.02 GB"):
        loop.train(config)
    assert list(tmp_path.iterdir()) == []


def test_a_quickstart_that_cannot_start_keeps_the_earlier_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    earlier = tmp_path / quickstart.QuickstartConfig.out / "steering.safetensors"
    earlier.parent.mkdir(parents=True)
    earlier.write_text("kept")
    monkeypatch.setattr(sys, "argv", ["train.quickstart", "--model", "missing.gguf"])
    with pytest.raises(ValueError, match=r"missing\.gguf"):
        quickstart.main()
    assert earlier.read_text() == "kept"


def test_a_stopped_quickstart_says_how_it_goes_on(tiny_folder, tmp_path, monkeypatch, capsys):
    """`jaxsteer quickstart` begins anew, so that the command is another one."""

    def stop(config):
        Path(config.out).mkdir()
        (Path(config.out) / "config.json").write_text("{}")

    monkeypatch.setattr(quickstart, "train", stop)
    out = tmp_path / "my run"
    monkeypatch.setattr(sys, "argv", ["train.quickstart", "--model", str(tiny_folder), "--out", str(out)])
    quickstart.main()
    assert f"-m train.sft --resume --out '{out}'" in capsys.readouterr().err


# ---- the same run, or another on purpose


def test_a_run_goes_on_with_its_own_data_only(config, run, tiny_data, tmp_path, monkeypatch):
    data = Path(shutil.copy(tiny_data, tmp_path / "data.jsonl"))
    fewer = "".join(data.read_text().splitlines(keepends=True)[:50])
    settings = json.loads((run / "config.json").read_text())
    settings["task"]["train"] = str(data)
    (run / "config.json").write_text(json.dumps(settings))
    resumed = replace(config, task=JsonlTask(str(data)), resume=True)
    data.write_text(fewer)
    monkeypatch.setattr(loop, "load_training", lambda *rest: pytest.fail("weights were read"))
    with pytest.raises(ValueError, match=r"data.jsonl.*had 100 examples with 400 tokens .* 50 .*--new-data"):
        loop.train(resumed)
    lines = tiny_data.read_text().splitlines(keepends=True)
    data.write_text("".join(reversed(lines)))
    with pytest.raises(ValueError, match="as many, but others"):
        loop.train(resumed)
    data.write_text(fewer)
    monkeypatch.setattr(loop, "load_training", lambda *rest: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        loop.train(replace(resumed, new_data=True))
    assert json.loads((run / "inputs.json").read_text())["train"]["examples"] == 50
    (line,) = read_history(RunFolder(run))
    assert line["steps"] == 2
    assert line["changed"]["data.train.examples"] == [100, 50]
    elsewhere = replace(resumed, task=JsonlTask(str(tiny_data)))
    with pytest.raises(ValueError, match=r"task.train is .* there"):
        loop.train(elsewhere)
    with pytest.raises(KeyboardInterrupt):
        loop.train(replace(elsewhere, new_data=True))
    assert read_history(RunFolder(run))[-1]["changed"]["task.train"] == [str(data), str(tiny_data)]


def test_a_run_goes_on_with_its_own_model_only(config, run, tiny_folder, tmp_path):
    from tiny_model import TINY
    from tiny_tokenizer import tiny_tokenizer

    model = tmp_path / "model"
    save_hf(model, TINY, init_base(TINY, jax.random.key(4)), "llama", tiny_tokenizer())
    settings = json.loads((run / "config.json").read_text()) | {"model": str(model)}
    (run / "config.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match="the weights of its base model have changed"):
        loop.train(replace(config, model=str(model), resume=True))


def resuming(run, *options):
    """The settings of `--resume --out RUN ...`, without a config file."""
    return from_command_line("sft", "x", sft.SftConfig, ["--resume", "--out", str(run), *options]).run


def test_another_setting_is_refused_by_name(config, run, weights):
    """The folder says all settings."""
    own = resuming(run)
    assert own == replace(config, resume=True)
    for changes, message in (
        ({"steps": 3}, "steps is 2 there, 3 here.*--resume --extend"),
        ({"seed": 1, "extend": True}, "seed is 0 there, 1 here. That cannot .*--extend can change optim, steps"),
        ({"steps": 1, "extend": True}, "has done 2 steps already"),
    ):
        with pytest.raises(ValueError, match=message):
            loop.train(replace(own, **changes))


@pytest.mark.slow
def test_a_run_is_extended_on_purpose(config, run):
    """More steps and another rate are taken and noted; the next resumption needs no option."""
    loop.train(resuming(run, "--steps", "3", "--optim.lr", "0.02", "--extend"))
    rows = [row for row in read_metrics(run / "metrics.jsonl") if "loss" in row]
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert [row["lr_activations"] for row in rows] == pytest.approx([0.01, 0.01, 0.02])
    changed = {"optim.lr": [0.01, 0.02], "steps": [2, 3]}
    assert [line["changed"] for line in read_history(RunFolder(run))] == [changed]
    assert [(line["done"], line["steps"]) for line in read_starts(RunFolder(run))] == [(0, 2), (2, 3)]
    notes = load_steering(run / "steering.safetensors").notes
    assert notes["history"][0]["changed"] == changed
    assert notes["inputs"]["train"]["examples"] == 100
    assert resuming(run) == replace(config, steps=3, optim=replace(config.optim, lr=0.02), resume=True)


def test_a_run_starts_from_another(config, finished, monkeypatch, capsys):
    before = load_steering(finished / "steering.safetensors")
    states = []
    monkeypatch.setattr(Training, "step", lambda self, state, batch: states.append(state) or pytest.fail("stopped"))
    continued = replace(config, plan=TrainConfig.plan, start_from=str(finished))
    with pytest.raises(pytest.fail.Exception, match="stopped"):
        loop.train(continued)
    assert "Plan of" in capsys.readouterr().out
    for ours, theirs in zip(jax.tree.leaves(states[0].params.steering), jax.tree.leaves(before.steering), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    prepared = prepare(continued, None, {})
    assert prepared.config.plan == ("fixed @ block",)
    assert prepared.inputs["start_from"]["path"] == str(finished)
    assert prepared.inputs["start_from"]["inputs"]["train"]["examples"] == 100
    with pytest.raises(ValueError, match=r'another plan.*--plan "fixed @ block"'):
        prepare(replace(continued, plan=("linear @ block",)), None, {})
    stored = prepared.settings
    assert start.filled(continued, stored).to_json() == stored
    assert prepare(continued, stored, prepared.inputs).start is not None
    assert prepare(continued, stored, {"start_from": {"sha256": "another"}}).start is None


CHAT = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}<|endoftext|>{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


def test_the_day_is_fixed_when_a_run_starts(config, tiny_folder, tmp_path):
    model = Path(shutil.copytree(tiny_folder, tmp_path / "model"))
    (model / "chat_template.jinja").write_text("{{ strftime_now('%Y-%m-%d') }}" + CHAT)
    chat = replace(config, model=str(model), task=replace(config.task, chat=True), sequence_length=64)
    today = prepare(chat, None, {})
    assert today.config.date == date.today().isoformat()
    early = prepare(chat, chat.to_json() | {"date": "2020-02-03"}, {})
    assert early.config.date == "2020-02-03"
    tokenizer = early.model.require_tokenizer()
    assert tokenizer.decode(early.data.source.examples[0].ids).startswith("2020-02-03[user]")
    assert early.inputs["train"]["sha256"] != today.inputs["train"]["sha256"]
    assert prepare(config, None, {}).config.date is None
    for wrong in ("yesterday", "2026-13-01"):
        with pytest.raises(ValueError, match="date must be a day"):
            replace(config, date=wrong)


def test_the_day_of_checkpoints_that_outlived_their_folder(config, tiny_folder, tmp_path):
    model = Path(shutil.copytree(tiny_folder, tmp_path / "model"))
    (model / "chat_template.jinja").write_text("{{ strftime_now('%Y') }}" + CHAT)
    chat = replace(config, model=str(model), task=replace(config.task, chat=True), sequence_length=64)
    away = replace(chat, checkpoints=str(tmp_path / "away"), auto_resume=True)
    assert prepare(away, None, {}).config.date == date.today().isoformat()
    assert not (tmp_path / "away").exists()
    with open_checkpoints(tmp_path / "away") as checkpoints:
        checkpoints.save(1, {"progress": {"step": 1}}, {"config": {"date": "2020-02-03"}})
    assert prepare(away, None, {}).config.date == "2020-02-03"
    assert prepare(replace(away, date="2021-01-01"), None, {}).config.date == "2021-01-01"
    assert prepare(replace(away, auto_resume=False), None, {}).config.date == date.today().isoformat()


# ---- looking before leaping


def test_a_dry_run_shows_all_and_writes_nothing(config, tmp_path, weights, monkeypatch, capsys):
    monkeypatch.setattr("train.run.preview._compiled_memory", lambda *rest: 12_300_000)
    monkeypatch.setattr(sft, "from_command_line", lambda *rest: sft.SftConfig(config, dry_run=True))
    sft.main()
    printed = capsys.readouterr().out
    for text in ("31,552 parameters", "100 examples, 400 tokens", "96 parameters", "12.30 MB", "a>⟦b<|endoftext|>⟧"):
        assert text in printed
    assert "2, 0.5 passes over the data" in printed
    assert list(tmp_path.iterdir()) == []


def test_weights_of_examples_are_shown(config):
    prepared = prepare(config, None, {})
    example = prepared.data.source.examples[0]
    halved = replace(example, weights=example.weights / 2)
    assert str(shown(halved, prepared.model.require_tokenizer())).endswith("a>b<|endoftext|>[weight 0.5]")
