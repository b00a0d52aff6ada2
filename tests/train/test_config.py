"""Settings of a run: what no run could have, config files and overrides, tasks as JSON."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from train.cli import from_command_line, load_config_file
from train.config import TrainConfig
from train.run.watch import EarlyStopping
from train.tasks import JsonlTask, ListOpsTask, task_from_json, task_to_json

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
