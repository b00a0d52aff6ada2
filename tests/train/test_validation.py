"""What a run is evaluated on: examples held out, the metric that decides, and settings without effect."""

import json
from dataclasses import replace

import numpy as np
import pytest

from train.cli import find_task
from train.config import TrainConfig
from train.data import Example, Turn
from train.evaluation.answers import ScoredAnswer
from train.evaluation.loss import Sums, total_loss
from train.run.log import described_answer
from train.run.validation import answers_tests, decide, read_splits, task_of
from train.tasks import HeldOutTask, JsonlTask
from train.tasks.scoring import is_checkable

LONG = "a whole sentence of free text here"


@pytest.fixture
def free(tmp_path):
    """Prompts with free text for an answer; every prompt appears twice."""
    path = tmp_path / "free.jsonl"
    rows = [{"prompt": f"tell {i % 20}", "completion": f"{LONG} {i}"} for i in range(40)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return JsonlTask(str(path))


def chat(*texts):
    return Example(tuple(Turn(role, text) for role, text in zip(("user", "assistant") * 2, texts, strict=False)), "f:1")


# ---- what can be right or wrong


@pytest.mark.parametrize(
    ("example", "rule", "checkable"),
    [
        (Example.of("a", "b", ""), "exact", True),
        (Example.of("a", LONG, ""), "exact", False),
        (Example.of("a", "one\ntwo", ""), "exact", False),
        (Example.of("a", LONG, "", answer="7"), "exact", True),
        (Example.of("a", LONG, "", choices=(LONG, "x")), "exact", True),
        (Example.of("a", LONG, ""), "number", True),
        (chat("who?", LONG), "exact", False),
        (chat("sure?", "Yes."), "exact", True),
        (Example((Turn("prompt", LONG),), ""), "number", False),
    ],
)
def test_free_text_is_told_from_answers(example, rule, checkable):
    assert is_checkable([example], rule) is checkable


def test_most_examples_decide():
    short, long = Example.of("a", "b", ""), Example.of("a", LONG, "")
    assert is_checkable([short, short, long], "exact")
    assert not is_checkable([short, long], "exact")
    assert not is_checkable([], "exact")


# ---- examples held out


def test_a_share_is_held_out_once_and_for_all(free):
    held = HeldOutTask(free, 0.2)
    train, validation = held.load("train"), held.load("validation")
    assert len(validation) == 8
    assert sorted([*train, *validation], key=str) == sorted(free.load("train"), key=str)
    asked = lambda examples: {example.turns[0] for example in examples}
    assert not asked(train) & asked(validation)  # the second of each pair does not stay behind
    assert HeldOutTask(free, 0.2).load("validation") == validation == held.load("test")
    assert [int(example.source.split(":")[1]) for example in train] == sorted(
        int(example.source.split(":")[1]) for example in train
    )
    config = TrainConfig(task=free, validation_share=0.2, seed=7)
    assert task_of(config).load("validation") == validation  # runs with other seeds are evaluated on the same
    assert config.to_json()["validation_share"] == 0.2


def test_what_cannot_be_held_out_is_refused(free, tmp_path):
    with pytest.raises(ValueError, match="has validation examples already"):
        HeldOutTask(replace(free, validation=free.train), 0.2).load("validation")
    (tmp_path / "one.jsonl").write_text('{"prompt": "a", "completion": "b"}\n' * 3)
    with pytest.raises(ValueError, match="3 training examples, 1 of them different, are too few"):
        HeldOutTask(JsonlTask(str(tmp_path / "one.jsonl")), 0.2).load("train")
    for share in (-0.1, 1.0):
        with pytest.raises(ValueError, match="--validation-share must be from 0 to below 1"):
            TrainConfig(validation_share=share)


# ---- settings without effect, and what decides


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"evaluate_every": 5}, "--evaluate-every 5: the task has no validation examples.*--validation-share"),
        ({"test_examples": 7}, "--test-examples 7: the task has no test examples.*--task.test"),
    ],
)
def test_evaluations_without_examples_are_refused(free, changes, message):
    config = TrainConfig(task=free, **changes)
    with pytest.raises(ValueError, match=message):
        decide(config, read_splits(config))


def test_settings_without_effect_are_named(free, capsys):
    for changes, said in (
        ({"select_by": "validation_loss"}, "--select-by: without effect"),
        ({"validation_examples": 9}, "--validation-examples: without effect"),
        ({"validation_share": 0.2}, "without --evaluate-every"),
        ({}, ""),
    ):
        config = TrainConfig(task=free, **changes)
        decide(config, read_splits(config))
        printed = capsys.readouterr().out
        assert said in printed
        assert bool(printed) == bool(said)


def test_the_loss_decides_over_free_text_and_accuracy_over_answers(free, tiny_data, capsys):
    config = TrainConfig(task=free, validation_share=0.2, evaluate_every=5)
    splits = read_splits(config)
    decided = decide(config, splits)
    assert decided.select_by == "validation_loss"
    assert not answers_tests(decided, splits)
    assert "the loss on them decides" in capsys.readouterr().out
    assert answers_tests(decide(replace(config, select_by="accuracy"), splits), splits)
    letters = replace(config, task=JsonlTask(str(tiny_data)))
    splits = read_splits(letters)
    assert decide(letters, splits).select_by == "accuracy"
    assert decide(replace(letters, select_by="validation_loss"), splits).select_by == "validation_loss"
    text = Example((Turn("prompt", LONG),), "f:3")
    with pytest.raises(ValueError, match="--select-by accuracy: f:3 has no answer"):
        decide(replace(letters, select_by="accuracy"), {"validation": [text], "test": []})


# ---- figures and what is printed of them


def test_every_token_counts_with_its_weight_whatever_its_batch():
    loss = total_loss([Sums(*map(np.asarray, row)) for row in ((6.0, 2.0, 1, 3), (1.0, 2.0, 1, 1))], "x")
    assert (loss.mean, loss.token_accuracy, loss.tokens) == (7 / 4, 2 / 4, 4)
    assert loss.perplexity == pytest.approx(np.exp(7 / 4))
    assert loss._replace(mean=1e4).perplexity == np.inf
    with pytest.raises(ValueError, match="validation examples: no token has a loss"):
        total_loss([Sums(*map(np.asarray, (0.0, 0.0, 0, 0)))], "validation examples")


def test_an_answer_fits_a_line():
    answer = ScoredAnswer("p" * 100 + "\nq", "o\n" * 100, None, "gold", False, False, "f:1")
    line = described_answer(answer, "earlier")
    assert "\n" not in line
    assert len(line) < 200
    assert line.startswith("“…ppp")
    assert "before: “earlier”" in line
    assert "reference: “gold”" in line
    assert described_answer(replace(answer, output="x", correct=True), "x").endswith("-> “x”")


def test_a_trained_run_is_evaluated_on_what_it_held_out(free):
    settings = json.loads(json.dumps(TrainConfig(task=free, validation_share=0.2).to_json()))
    task = find_task(None, None, {"config": settings})
    assert task.load("test") == HeldOutTask(free, 0.2).load("validation")
    assert find_task(None, free.train, {"config": settings}).load("test") == free.load("train")
