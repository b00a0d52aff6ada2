"""Rows whose length the data chooses."""

import json
from dataclasses import replace

import numpy as np
import pytest

from train.base_models import describe
from train.config import TrainConfig
from train.run import loop, row_length
from train.run.folder import RunFolder
from train.run.program import make_program
from train.run.row_length import with_row_length
from train.tasks import JsonlTask


@pytest.fixture
def config(tiny_folder, tiny_data, tmp_path):
    return TrainConfig(
        task=JsonlTask(str(tiny_data)),
        model=str(tiny_folder),
        plan=("fixed @ block",),
        steps=1,
        batch_size=2,
        sequence_length=0,
        test_examples=0,
        out=str(tmp_path / "run"),
    )


def of_length(config, tmp_path, *lengths):
    """The run with examples of these many tokens, the completion's two included."""
    path = tmp_path / "lengths.jsonl"
    rows = [{"prompt": "a" * (length - 2), "completion": "b"} for length in lengths]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return replace(config, task=JsonlTask(str(path)))


def described(config):
    """The run's model, without weights, for longer texts."""
    model = describe(config.model, config.dtype)
    return replace(model, config=replace(model.config, max_length=1024))


def chosen(config):
    return with_row_length(config, described(config)).sequence_length


def test_examples_that_fill_a_row_need_no_longer_one(config, tmp_path):
    assert chosen(of_length(config, tmp_path, *[64] * 32)) == 64
    assert chosen(of_length(config, tmp_path, *[64] * 32, 65)) >= 128  # none is too long


def test_padding_is_saved_while_attention_costs_less(config, tmp_path):
    run = of_length(config, tmp_path, *[40] * 64)
    fill = lambda length: row_length._fill(np.full(64, 40), length, True)
    best = min(
        range(64, 1025, 64), key=lambda length: row_length._cost(run, described(run), length, fill(length), 0.05)
    )
    assert chosen(run) == best > 64
    assert chosen(replace(run, pack=False)) == 64


def test_the_choice_belongs_to_the_run(config, tmp_path):
    loop.train(config)
    folder = RunFolder(tmp_path / "run")
    length = json.loads(folder.config.read_text())["sequence_length"]
    assert length == 64
    loop.train(replace(config, resume=True, extend=True, steps=2))
    assert json.loads(folder.config.read_text())["sequence_length"] == length


def test_elsewhere_a_number_is_needed(config):
    model = describe(config.model, config.dtype)
    with pytest.raises(ValueError, match="--sequence-length 0: only a training run"):
        make_program(config, model.config, model.base, steps=1)
