"""GRPO end to end on a tiny model: it learns a reward, resumes exactly, and says what is wrong."""

import json
from dataclasses import replace
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from jaxsteer.io import load_steering
from jaxsteer.optim import OptimConfig
from train.config import parse_run, plain_run
from train.config.grpo import GrpoConfig, PolicyLoss
from train.run import from_rewards, loop
from train.run.folder import RunFolder
from train.run.from_rewards import FromRewards, told_of
from train.run.metrics import read_metrics
from train.run.rollouts import PromptSource, Sampled, learned_groups, microbatches_of
from train.tasks import JsonlTask

pytestmark = pytest.mark.xdist_group("grpo")


@pytest.fixture(scope="module")
def settings(tiny_folder, tiny_data, tmp_path_factory):
    """Two-token answers to letters, rewarded for small bytes: about a third of them at first.

    The base trains too: steering alone cannot move the flat predictions of random weights far.
    """
    rewards = tmp_path_factory.mktemp("rewards") / "rewards.py"
    rewards.write_text("def early(example, answer):\n    return float(bool(answer) and ord(answer[0]) < 90)\n")
    return GrpoConfig(
        task=JsonlTask(str(tiny_data), max_new_tokens=2),
        model=str(tiny_folder),
        plan=("nonlinear(rank=4) @ block",),
        train_base=True,
        optim=OptimConfig(lr=0.1, schedule="constant", warmup=0),
        rewards=(f"{rewards}:early",),
        prompts=4,
        group=8,
        steps=8,
        batch_size=2,
        sequence_length=32,
        test_examples=0,
        eval_batch_size=32,
        checkpoint_every=4,
        show_rollouts=2,
    )


def run(config, out):
    return loop.train(replace(config, out=str(out)), algorithm=FromRewards())


@pytest.fixture(scope="module")
def finished(settings, tmp_path_factory):
    out = tmp_path_factory.mktemp("grpo") / "run"
    run(settings, out)
    return RunFolder(out)


def rows_of(folder):
    return [row for row in read_metrics(folder.metrics) if "reward" in row]


def steering(folder):
    return jax.tree.leaves(load_steering(folder.steering).steering)


def test_it_learns_and_tells(finished, settings):
    rows = rows_of(finished)
    rewards = [row["reward"] for row in rows]
    assert np.mean(rewards[-2:]) > np.mean(rewards[:2]) + 0.2
    told = {"reward_spread", "answer_length", "truncated", "equal_groups", "entropy", "sampling_seconds", "clip_share"}
    assert told <= set(rows[0])
    assert rows[0]["kl"] == pytest.approx(0, abs=1e-5)
    assert rows[2]["kl"] > 0
    shown = read_metrics(finished.folder / "rollouts.jsonl")
    assert sorted({row["step"] for row in shown}) == [1, 3, 5, 7]
    assert len(shown[0]["answers"]) == len(shown[0]["rewards"]) == settings.group
    FromRewards().draw(finished)
    assert (finished.folder / "grpo.png").stat().st_size > 10_000


@pytest.mark.parametrize("updates", [1, 2])
def test_a_run_resumes_with_the_same_bits(settings, tmp_path, monkeypatch, updates):
    config = replace(settings, updates=updates, policy=PolicyLoss(beta=0.1))
    run(config, tmp_path / "whole")

    collect, calls = from_rewards.RolloutFeed._collect, []

    def killed(self, step, params):
        if step == 6:
            raise KeyboardInterrupt
        calls.append(step)
        return collect(self, step, params)

    monkeypatch.setattr(from_rewards.RolloutFeed, "_collect", killed)
    with pytest.raises(KeyboardInterrupt):
        run(config, tmp_path / "stopped")
    monkeypatch.setattr(from_rewards.RolloutFeed, "_collect", collect)
    assert calls == list(range(0, 6, updates))
    run(replace(config, resume=True), tmp_path / "stopped")
    whole, stopped = (RunFolder(tmp_path / name) for name in ("whole", "stopped"))
    for one, other in zip(steering(whole), steering(stopped), strict=True):
        np.testing.assert_array_equal(one, other)
    tables = [read_metrics(folder.folder / "rollouts.jsonl") for folder in (whole, stopped)]
    assert tables[0] == tables[1]


def test_settings_come_back(settings, finished):
    stored = json.loads(finished.config.read_text())
    assert stored["program"] == "grpo"
    assert parse_run(stored, "here").rewards == settings.rewards
    assert parse_run(plain_run(settings), "here") == settings


def sampled(number, rewards, lengths=(2, 1, 2, 1), ended=True):
    tokens = [np.arange(3, 3 + n, dtype=np.int32) for n in lengths]
    nothing = np.zeros(0, np.float32)
    return [Sampled(number, t, "x", (r,), r, ended, nothing) for t, r in zip(tokens, rewards, strict=True)]


class Prompt(SimpleNamespace):
    def __len__(self):
        return len(self.ids)


def prompt(*ids):
    return Prompt(ids=np.array(ids), completion=np.zeros(len(ids), bool), prompt_length=len(ids), source="q")


def test_rows_hold_what_changes_something(settings):
    prompts = [prompt(*range(3, 3 + n)) for n in (4, 5)]
    answers = [sampled(0, (1, 0, 0, 1)), sampled(1, (1, 1, 1, 1))]
    for shared in (True, False):
        (learned,) = learned_groups(answers, prompts, settings, shared=shared)
        assert learned.group.shared == (3 if shared else 0)
        assert learned.advantages == pytest.approx([0.866, -0.866, -0.866, 0.866], abs=1e-3)
        rows = microbatches_of([learned], settings, shared=shared)
        assert rows.batch.tokens.shape == (1, 2, 32)
        counted = rows.batch.weights != 0
        assert counted.sum() == 6
        assert np.all((rows.advantages != 0) == counted)
    short = replace(settings, sequence_length=6)
    pieces = learned_groups(answers, prompts, short, shared=True)
    assert [len(piece.advantages) for piece in pieces] == [1, 1, 1, 1]
    left_out = replace(settings, keep_truncated=False)
    assert learned_groups([sampled(0, (1, 0, 0, 1), ended=False)], prompts, left_out, shared=True) == []
    assert microbatches_of([], settings, shared=True).batch.tokens.shape == (1, 2, 32)


def test_what_is_told_of_rollouts():
    rewards = (SimpleNamespace(name="a"), SimpleNamespace(name="b"))
    answers = [s._replace(rewards=(s.reward, 1.0)) for s in sampled(0, (1, 0, 0, 1))]
    found = told_of([answers], rewards)
    assert (found["reward"], found["reward_spread"], found["answer_length"]) == (0.5, 0.5, 1.5)
    assert (found["reward_a"], found["reward_b"], found["equal_groups"], found["truncated"]) == (0.5, 1.0, 0, 0)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"group": 1}, "--group must be at least 2"),
        ({"temperature": 0.0}, "greedy answers are all the same"),
        ({"updates": 3}, "--checkpoint-every must be a multiple of --updates 3"),
        ({"grad_accumulation": 2}, "--grad-accumulation 2: rollouts are divided"),
        ({"prompts": 0}, "--prompts must be at least 1"),
    ],
)
def test_settings_that_no_run_could_have(settings, changes, said):
    with pytest.raises(ValueError, match=said):
        replace(settings, **changes)


@pytest.mark.parametrize(
    ("reward", "said"),
    [
        ("return float('nan')", r"reward .*: .*letters.jsonl:1, answer 'b': gave nan, need a finite number"),
        ("raise KeyError('x')", r"reward .*letters.jsonl:1, answer 'b': KeyError: 'x'"),
        ("return 'good'", "gave 'good', need a number"),
    ],
)
def test_rewards_that_fail_are_named_before_weights_are_read(settings, tmp_path, monkeypatch, reward, said):
    file = tmp_path / "bad.py"
    file.write_text(f"def f(example, answer):\n    {reward}\n")
    monkeypatch.setattr(loop, "load_training", lambda *rest: pytest.fail("weights were read"))
    with pytest.raises(ValueError, match=said):
        run(replace(settings, rewards=(f"{file}:f",)), tmp_path / "run")


def test_prompts_that_leave_no_room(settings, tmp_path):
    data = tmp_path / "long.jsonl"
    data.write_text(json.dumps({"prompt": "x" * 40, "completion": "y"}) + "\n")
    with pytest.raises(ValueError, match=r"long.jsonl:1: a prompt of 40 tokens leaves no room for an answer of 2"):
        run(replace(settings, task=JsonlTask(str(data), max_new_tokens=2)), tmp_path / "run")


def test_the_order_of_questions_is_a_function_of_the_seed(settings):
    prompts = [prompt(3, 4) for _ in range(10)]
    source = PromptSource([], prompts, 0, replace(settings, updates=2, checkpoint_every=4), [])
    assert source.asked(0).tolist() == source.asked(1).tolist() != source.asked(2).tolist()
    assert sorted(np.concatenate([source.asked(step) for step in range(0, 10, 2)]).tolist()) == sorted([*range(10)] * 2)
    assert source.steps(1.0) == 6
