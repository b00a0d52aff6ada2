"""Mixtures: shares, determinism, and the parts' names in the sources."""

import json
from collections import Counter

import numpy as np
import pytest

from train.cli import from_command_line
from train.config import TrainConfig
from train.run.result import notes_of
from train.tasks import HubTask, JsonlTask, ListOpsTask, MixtureTask, on_file, task_from_json, task_to_json
from train.tasks.mixture import interleaved
from train.tasks.perturb import perturbed


@pytest.fixture
def parts(tmp_path):
    """A task of 10 examples and one of 30."""
    made = []
    for name, count in (("small", 10), ("large", 30)):
        path = tmp_path / f"{name}.jsonl"
        rows = [{"prompt": f"{name} question {i}", "completion": "c"} for i in range(count)]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        made.append(JsonlTask(str(path), str(path), max_new_tokens=count))
    return tuple(made)


def part_of(example):
    return example.source.partition(":")[0]


def counts(examples):
    return dict(Counter(map(part_of, examples)))


def test_shares(parts, capsys):
    assert counts(MixtureTask(parts).load("train")) == {"small": 10, "large": 30}
    assert counts(MixtureTask(parts, weights=(3, 1)).load("train")) == {"small": 30, "large": 10}
    assert "mixture: small gives 30 of 40 training examples, 3 passes over its 10" in capsys.readouterr().err
    assert counts(MixtureTask(parts, weights=(1, 2), examples=100).load("train")) == {"small": 33, "large": 67}
    assert counts(MixtureTask(parts, weights=(0, 1)).load("train")) == {"large": 40}


def test_a_larger_share_repeats_whole_passes_and_a_smaller_one_selects(parts):
    examples = MixtureTask(parts, weights=(3, 1), examples=32).load("train")
    times = Counter(example.turns[0].text for example in examples)
    small = [count for text, count in times.items() if text.startswith("small")]
    assert (len(small), set(small)) == (10, {2, 3})
    assert Counter(times[text] for text in times if text.startswith("large")) == {1: 8}


def test_the_order_is_a_function_of_the_seed(parts):
    mixture = MixtureTask(parts, weights=(1, 1))
    assert mixture.load("train") == MixtureTask(parts, weights=(1, 1)).load("train")
    assert mixture.load("train") != MixtureTask(parts, weights=(1, 1), seed=1).load("train")
    # Spread evenly: every window has both.
    assert all(len(counts(mixture.load("train")[i : i + 4])) == 2 for i in range(37))


def test_evaluation_has_all_examples_and_every_prefix_the_same_proportions(parts):
    examples = MixtureTask(parts, weights=(9, 1)).load("test")
    assert counts(examples) == {"small": 10, "large": 30}
    assert counts(examples[:8]) == {"small": 2, "large": 6}
    assert examples[0].source.endswith("large.jsonl:1")
    assert interleaved([np.array([1, 2]), np.array([], int)]).tolist() == [1, 2]


def test_names(parts):
    assert MixtureTask(parts, names=("a", "b")).part_names == ("a", "b")
    assert MixtureTask((*parts, parts[0])).part_names == ("small 1", "large", "small 2")
    assert MixtureTask((HubTask("listops"),)).part_names == ("listops",)


def test_as_a_task(parts, tmp_path):
    mixture = MixtureTask(parts, weights=(1, 3), names=("a", "b"))
    assert task_from_json(json.loads(json.dumps(task_to_json(mixture)))) == mixture
    assert (mixture.max_new_tokens, mixture.rule, mixture.chat, mixture.template) == (30, "exact", False, "{prompt}")
    assert TrainConfig(task=mixture).to_json()["task"]["parts"][1]["type"] == "JsonlTask"
    assert len(on_file(mixture, parts[0].train).load("test")) == 10
    changed = perturbed(mixture, "test", "typos")
    assert [example.source for example in changed] == [example.source for example in mixture.load("test")]
    config = tmp_path / "mixed.py"
    config.write_text(
        "from train.config import TrainConfig\nfrom train.tasks import JsonlTask, MixtureTask\n"
        "def config():\n    return TrainConfig(task=MixtureTask((JsonlTask('a'), JsonlTask('b')), weights=(1, 1)))\n"
    )
    options = ["--task.weights", "1", "3", "--task.parts.1.train", "c"]
    task = from_command_line("sft", "", TrainConfig, [str(config), *options]).task
    assert task == MixtureTask((JsonlTask("a"), JsonlTask("c")), weights=(1, 3))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"parts": ()}, r"task\.parts: .*at least one"),
        ({"weights": (1,)}, r"task\.weights: got 1 for 2 parts"),
        ({"weights": (0, 0)}, r"task\.weights: .*not all 0"),
        ({"weights": (1, float("nan"))}, r"task\.weights"),
        ({"names": ("a",)}, r"task\.names: got 1 for 2"),
        ({"examples": 0}, r"task\.examples must be at least 1"),
        ({"parts": (JsonlTask("a", chat=True), JsonlTask("b"))}, r"the same chat; got False, True"),
        ({"parts": (ListOpsTask(), JsonlTask("b"))}, r"the same rule; got digit, exact"),
    ],
)
def test_refuses(parts, settings, message):
    with pytest.raises(ValueError, match=message):
        MixtureTask(**{"parts": parts, **settings})


def test_refuses_a_share_of_nothing_and_a_mixture_in_a_mixture(parts):
    empty = HubTask("alpaca", test="none.jsonl")
    with pytest.raises(ValueError, match=r"alpaca has no training examples, but a share of them"):
        MixtureTask((parts[0], empty), weights=(1, 1)).load("train")
    inner = task_to_json(MixtureTask(parts))
    for part in (inner, "x"):
        with pytest.raises(ValueError, match="a part of a mixture"):
            task_from_json({**inner, "parts": [part]})


def test_generation_asks_as_alpaca_did(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"instruction": "Sing.", "output": "la"}\n')
    task = JsonlTask(str(path))
    asked = notes_of(TrainConfig(task=task))["template"].replace("{prompt}", "Sing.")
    assert asked == task.load("train")[0].turns[0].text
    assert notes_of(TrainConfig(task=JsonlTask(str(path), chat=True)))["template"] == "{prompt}"
    assert HubTask("alpaca").template == "### Instruction:\n{prompt}\n\n### Response:\n"
