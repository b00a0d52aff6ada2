"""Settings of a run: what no run could have, config files and overrides, tasks as JSON."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from train import sft
from train.cli import from_command_line, load_config_file, run_main
from train.config import TrainConfig
from train.data import Keys
from train.plain import to_plain
from train.run.watch import EarlyStopping
from train.tasks import JsonlTask, ListOpsTask, MixtureTask, task_from_json, task_to_json

ROOT = Path(__file__).resolve().parents[2]


def test_patience_starts_anew_with_each_better_accuracy():
    early = EarlyStopping.replay(2, "max", [0.5, 0.4])
    assert early.update(0.6)
    assert not early.update(0.6)
    assert not early.should_stop
    assert not early.update(0.1)
    assert early.should_stop
    assert not EarlyStopping.replay(0, "max", [0.5, 0.4, 0.3]).should_stop
    assert EarlyStopping.replay(2, "min", [0.5, 0.4, 0.6, float("nan")]).should_stop
    assert EarlyStopping.replay(2, "min", [float("nan")] * 2).should_stop
    assert not EarlyStopping.replay(2, "min", [float("nan"), 0.4, 0.6]).should_stop
    with pytest.raises(ValueError, match="patience"):
        TrainConfig(patience=1)
    for wrong in ({"epochs": 0}, {"validation_examples": -1}, {"test_examples": -1}):
        with pytest.raises(ValueError, match=f"--{next(iter(wrong)).replace('_', '-')} must be"):
            TrainConfig(**wrong)


def test_configs_and_overrides(tmp_path):
    shipped = load_config_file(ROOT / "configs" / "listops_smollm2.py", TrainConfig)
    changed = from_command_line(
        "sft", "x", TrainConfig, [str(ROOT / "configs/listops_smollm2.py"), "--optim.lr", "0.003", "--batch-size", "2"]
    )
    assert changed == replace(shipped, batch_size=2, optim=replace(shipped.optim, lr=0.003))
    with pytest.raises(SystemExit):
        from_command_line("sft", "x", TrainConfig, ["--optim.learning-rate", "1"])
    with pytest.raises(ValueError, match="no such config file"):
        from_command_line("sft", "x", TrainConfig, [str(tmp_path / "missing.py")])
    (tmp_path / "empty.py").write_text("x = 1\n")
    with pytest.raises(ValueError, match="def config"):
        from_command_line("sft", "x", TrainConfig, [str(tmp_path / "empty.py")])


def test_tasks_survive_json():
    for task in (ListOpsTask(), JsonlTask("a.jsonl", chat=True)):
        assert task_from_json(json.loads(json.dumps(task_to_json(task)))) == task
    with pytest.raises(ValueError, match="unknown task"):
        task_from_json({"type": "Chess"})


def test_a_mixture_comes_out_as_yaml_and_goes_in_again(tmp_path):
    parts = (
        JsonlTask("a.jsonl", rule="digit"),
        ListOpsTask(),
        JsonlTask("b.jsonl", rule="digit", keys=Keys(prompt="question")),
    )
    mixed = TrainConfig(task=MixtureTask(parts, weights=(1, 2.5, 3)), epochs=3)
    file = tmp_path / "mine.yaml"
    file.write_text(yaml.safe_dump(to_plain(mixed)))
    assert load_config_file(file, TrainConfig) == mixed


def test_settings_come_out_as_yaml_and_go_in_again(tmp_path, monkeypatch, capsys):
    file = tmp_path / "mine.yaml"
    options = ("--task.train", "mine.jsonl", "--optim.lr", "3e-3", "--task.chat")
    monkeypatch.setattr(sys, "argv", ["train.sft", "jsonl", *options, "--print-config"])
    with pytest.raises(SystemExit) as ended:
        run_main(sft.main)
    assert ended.value.code == 0
    written = capsys.readouterr().out
    file.write_text(written)
    monkeypatch.setattr(sys, "argv", ["train.sft", str(file), "--print-config"])
    with pytest.raises(SystemExit):
        run_main(sft.main)
    assert capsys.readouterr().out == written
    shipped = load_config_file("jsonl", TrainConfig)
    mine = replace(shipped, task=JsonlTask("mine.jsonl", chat=True), optim=replace(shipped.optim, lr=3e-3))
    assert from_command_line("sft", "x", TrainConfig, [str(file), "--steps", "7"]) == replace(mine, steps=7)
    read = lambda: load_config_file(file, TrainConfig)
    assert read() == mine
    for text, message in (
        ("optim: {lrr: 1}", r"mine.yaml: optim.lrr: no such setting \(did you mean lr\?\)"),
        ("remat: ful", r"remat must be none, selective, full, got 'ful' \(did you mean full\?\)"),
        ("steps: many", "steps must be a whole number or null, got 'many'"),
        ("a: [", r"mine.yaml:1: not YAML"),
        ("[" * 9999, "not YAML"),
        ("batch_size: 0", "mine.yaml: --batch-size must be at least 1"),
        ("task: {type: JsonTask}", "did you mean JsonlTask"),
        ("", "must be settings"),
        ("task: 3", "task must be settings, got 3"),
        ("task: {train: x}", "task.type is missing; there are ListOpsTask, JsonlTask"),
    ):
        file.write_text(text)
        with pytest.raises(ValueError, match=message):
            read()
    file.write_text("optim: {lr: 3e-3}\ndate: 2026-01-31\ndistributed: {join: no}\n")
    assert (read().optim.lr, read().date, read().distributed.join) == (3e-3, "2026-01-31", "no")
