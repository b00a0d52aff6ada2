"""Learning from rewards on a tiny model: rollouts, their rows and loss, resuming, and what is refused."""

import importlib
import json
import shutil
import sys
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
import pytest
import yaml

from jaxsteer.batches import stack_rows
from jaxsteer.inference import draining
from jaxsteer.io import load_steering
from jaxsteer.objectives import group_advantages
from jaxsteer.objectives.objective import policy_log_probabilities
from jaxsteer.optim import OptimConfig
from train import grpo
from train.cli import load_config_file, run_main
from train.config.grpo import GrpoConfig, PolicyLoss
from train.plain import to_plain
from train.report.page import make_page
from train.run import from_rewards
from train.run.folder import RunFolder
from train.run.from_rewards import FromRewards, RolloutFeed
from train.run.loop import train
from train.run.metrics import read_metrics
from train.run.rollouts import Sampled, learned_groups, microbatches_of
from train.run.start import load_training, prepare
from train.tasks import JsonlTask

OWN = """
def early(example, answer):
    return sum(character < "a" for character in answer) / 4

def small(example, answer):
    return float(bool(answer) and ord(answer[0]) < 90)

def fails_later(example, answer):
    if example.source.endswith(":1"):
        return 0.0
    raise RuntimeError("no sense in " + example.source)

def same(example, answer):
    return 1.0
"""


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    file = tmp_path_factory.mktemp("rewards") / "own.py"
    file.write_text(OWN)
    return str(file)


@pytest.fixture(scope="module")
def settings(tiny_folder, tiny_data, own):
    """What the runs have in common, so that they share compiled programs."""
    return GrpoConfig(
        task=JsonlTask(str(tiny_data), validation=str(tiny_data), max_new_tokens=4),
        model=str(tiny_folder),
        plan=("fixed @ block",),
        optim=OptimConfig(lr=1e-1, schedule="constant", warmup=0),
        rewards=(f"{own}:early",),
        steps=6,
        prompts=4,
        group=4,
        batch_size=2,
        sequence_length=32,
        test_examples=0,
        validation_examples=4,
        eval_batch_size=8,
        show_rollouts=2,
        checkpoint_every=2,
    )


@pytest.fixture
def config(settings, tmp_path):
    return replace(settings, out=str(tmp_path / "run"))


@pytest.fixture(scope="module")
def finished(settings, tmp_path_factory):
    """A whole run, for tests that only read it."""
    out = tmp_path_factory.mktemp("finished") / "run"
    return train(replace(settings, evaluate_every=6, out=str(out)), algorithm=FromRewards())


@pytest.fixture
def training(config):
    return load_training(prepare(config, None, {}, FromRewards()))


def feed_of(training, tmp_path):
    folder = RunFolder(tmp_path / "fed")
    folder.folder.mkdir(exist_ok=True)
    return RolloutFeed(training, folder, range(training.steps))


def command(monkeypatch, capsys, *arguments, module="train.grpo", fails=False):
    """What a command prints."""
    monkeypatch.setattr(sys, "argv", [module, *map(str, arguments)])
    capsys.readouterr()
    with pytest.raises(SystemExit) if fails else nullcontext():
        run_main(importlib.import_module(module).main)
    printed = capsys.readouterr()
    return printed.err if fails else printed.out


def leaves(path):
    return jax.tree.leaves(load_steering(path).steering)


# ---- a run


def test_a_run_leaves_what_it_promises(finished):
    rows = [row for row in read_metrics(finished.run.metrics) if "reward" in row]
    assert [row["step"] for row in rows] == list(range(1, 7))
    names = {"reward_spread", "answer_length", "truncated", "equal_groups", "entropy", "sampling_seconds", "clip_share"}
    assert all(names <= set(row) for row in rows)
    assert ["kl" in row for row in rows] == [True, False] * 3
    assert rows[0]["kl"] == pytest.approx(0, abs=1e-6)  # of the start to itself
    assert rows[-2]["kl"] > 1e-3
    table = read_metrics(finished.run.folder / "rollouts.jsonl")
    assert [row["step"] for row in table] == [1] * 4 + [3] * 4 + [5] * 4
    assert all(len(row["answers"]) == len(row["rewards"]) == 4 for row in table)
    assert (finished.run.folder / "grpo.png").stat().st_size > 5_000


@pytest.mark.slow
def test_a_model_learns_a_simple_reward_in_few_steps(settings, own, tmp_path, capsys):
    """The base trains: steering alone cannot move the flat predictions of random weights far."""
    config = replace(
        settings,
        task=replace(settings.task, max_new_tokens=2),
        rewards=(f"{own}:small",),
        train_base=True,
        plan=("nonlinear(rank=4) @ block",),
        optim=OptimConfig(lr=0.1, schedule="constant", warmup=0),
        group=8,
        steps=8,
        eval_batch_size=32,
        out=str(tmp_path / "run"),
    )
    run = train(config, algorithm=FromRewards()).run
    rewards = [row["reward"] for row in read_metrics(run.metrics) if "reward" in row]
    assert np.mean(rewards[-2:]) > np.mean(rewards[:2]) + 0.2
    assert "the pretrained base is held besides the trained one" in " ".join(capsys.readouterr().out.split())


def test_the_report_shows_rollouts(finished):
    page = make_page([str(finished.run.folder)], 10)
    for title in ("Reward", "Length of answers", "Entropy", "KL to the reference"):
        assert f">{title}" in page
    assert 'class="problem"' not in page


def test_its_folder_is_evaluated(finished, monkeypatch, capsys, tiny_data):
    said = command(
        monkeypatch, capsys, finished.run.folder, "--data", tiny_data, "--examples", 4, module="train.evaluate"
    )
    assert "accuracy" in said


@pytest.mark.parametrize("updates", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_a_resumed_run_ends_with_the_same_bits(config, updates, monkeypatch):
    config = replace(config, updates=updates, steps=4)
    whole = train(config, algorithm=FromRewards()).run
    again = replace(config, out=config.out + "_again", resume=False)
    sample = from_rewards.Sampler.sample

    def killed(self, step, params):
        if step == 2:
            raise KeyboardInterrupt
        return sample(self, step, params)

    monkeypatch.setattr(from_rewards.Sampler, "sample", killed)
    with pytest.raises(KeyboardInterrupt):
        train(again, algorithm=FromRewards())
    monkeypatch.undo()
    resumed = train(replace(again, resume=True), algorithm=FromRewards()).run
    for ours, theirs in zip(leaves(whole.steering), leaves(resumed.steering), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    table = lambda run: (run.folder / "rollouts.jsonl").read_text()
    assert table(whole) == table(resumed)
    assert len(set(table(resumed).splitlines())) == len(table(resumed).splitlines())


def test_a_start_is_the_reference_through_all_steps(config, finished):
    config = replace(config, start_from=str(finished.run.folder), plan=(), policy=PolicyLoss(beta=0.1), steps=3)
    run = train(config, algorithm=FromRewards()).run
    rows = [row for row in read_metrics(run.metrics) if "reward" in row]
    assert rows[0]["kl"] == pytest.approx(0, abs=1e-6)
    assert all(row["kl"] > 1e-5 for row in rows[1:])


def test_a_start_that_is_gone_is_not_replaced_by_another_reference(config, finished, tmp_path):
    start = tmp_path / "start"
    shutil.copytree(finished.run.folder, start)
    config = replace(config, start_from=str(start), plan=(), steps=2)
    train(config, algorithm=FromRewards())
    shutil.rmtree(start)
    more = replace(config, resume=True, extend=True, steps=4)
    with pytest.raises(ValueError, match="it is the reference of the run"):
        train(more, algorithm=FromRewards())


def test_rewards_that_change_are_not_gone_on_with(config, own, tmp_path):
    mine = tmp_path / "mine.py"
    mine.write_text(OWN)
    config = replace(config, rewards=(f"{mine}:early",), steps=2)
    train(config, algorithm=FromRewards())
    mine.write_text(OWN.replace("/ 4", "/ 5"))
    with pytest.raises(ValueError, match=r"its training data \(.*mine\.py\) had .* but others"):
        train(replace(config, resume=True, extend=True, steps=4), algorithm=FromRewards())


# ---- rollouts


class Single(NamedTuple):
    """An answer in a row of its own, as `jaxsteer.batches.Tokens`."""

    ids: np.ndarray
    completion: np.ndarray
    weights: np.ndarray
    prompt_length: int


def test_rollouts_are_a_function_of_seed_step_and_parameters(training, tmp_path, monkeypatch):
    params = training.answering(training.state)
    with feed_of(training, tmp_path) as feed:
        sampler = feed._sampler
        first, second, again = (sampler.sample(step, params) for step in (0, 1, 0))
    texts = lambda groups: [[answer.tokens.tolist() for answer in group] for group in groups]
    assert texts(first) == texts(again)
    assert texts(first) != texts(second)
    assert len({str(answer) for answer in texts(first)[0]}) > 1
    layouts = []
    choose = draining.next_prefill
    monkeypatch.setattr(draining, "next_prefill", lambda *a, **k: layouts.append(choose(*a, **k)) or layouts[-1])
    sampler.sample(0, params)
    assert layouts
    assert all(sum(map(len, layout.rows)) < layout.size for layout in layouts)  # a question is read once
    for group in first:
        assert len({answer.number for answer in group}) == 1
        for answer in group:
            assert 1 <= len(answer.tokens) <= 5
            assert answer.ended == (answer.tokens[-1] == training.data.end)


def answered(training, rewards, *, ended=True):
    """Groups of made-up answers of different lengths with these rewards [Q, G]."""
    draw = np.random.default_rng(0)
    text = lambda size: draw.integers(97, 122, size).astype(np.int32)
    return [
        [Sampled(q, text(1 + (q + g) % 4), "", (r,), r, ended, np.zeros(1, np.float32)) for g, r in enumerate(row)]
        for q, row in enumerate(rewards)
    ]


@pytest.mark.parametrize(("average", "shared"), [("tokens", True), ("answers", False), ("constant", True)])
def test_the_packed_loss_is_that_of_the_answers_one_by_one(training, average, shared):
    config = replace(training.config, policy=PolicyLoss(average=average))
    rewards = [[0.0, 1, 1], [1, 1, 1], [2, 0, 0.5]]
    sampled = answered(training, rewards)
    objective = config.loss
    learned = learned_groups(sampled, training.data.prompts, config, shared=shared)
    packed = microbatches_of(learned, config, shared=shared)
    params, model = training.answering(training.state), training.program.model
    steering = jax.tree.map(lambda leaf: leaf + 0.01, params.steering)
    base = training.loaded.base

    loss = jax.jit(lambda rows: objective(model, base, steering, rows, None, None, train=True).loss)
    total = sum(loss(jax.tree.map(lambda f, m=m: f[m], packed)) for m in range(len(packed.advantages)))

    gradient = jax.jit(
        jax.grad(
            lambda steering: sum(
                objective(model, base, steering, jax.tree.map(lambda f, m=m: f[m], packed), None, None, train=True).loss
                for m in range(len(packed.advantages))
            )
        )
    )(steering)

    advantages = group_advantages(np.array(rewards), "std")
    rows, kept = [], []
    for group, own in zip(sampled, advantages, strict=True):
        for answer, advantage in zip(group, own, strict=True):
            prompt = training.data.prompts[answer.number]
            rows.append((prompt, answer.tokens, advantage))
            kept.append(len(answer.tokens))

    def alone(prompt, tokens):
        ids, answer = np.concatenate([prompt.ids, tokens]), np.arange(len(prompt) + len(tokens)) >= len(prompt)
        return Single(ids, answer, answer.astype(np.float32), len(prompt))

    batch = stack_rows([[alone(prompt, tokens)] for prompt, tokens, _ in rows], 16)
    lengths, own = np.float32(kept), np.float32([advantage for *_, advantage in rows])
    share = own / lengths if average == "answers" else own

    def one_by_one(steering):
        chosen = policy_log_probabilities(model, base, steering, batch).sum(axis=1)
        return -(share * (chosen - jax.lax.stop_gradient(chosen) + lengths)).sum()

    expected, slope = jax.jit(jax.value_and_grad(one_by_one))(steering)
    np.testing.assert_allclose(total, expected, rtol=1e-4, atol=1e-5)
    for ours, theirs in zip(jax.tree.leaves(gradient), jax.tree.leaves(slope), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=2e-3, atol=2e-5)
    divisors = {"tokens": sum(kept), "answers": 9, "constant": 9 * 5}
    assert objective.divisor(np.array(kept)) == divisors[average]


def test_groups_of_equal_rewards_change_nothing(config, own):
    config = replace(config, rewards=(f"{own}:same",), steps=2)
    run = train(config, algorithm=FromRewards()).run
    rows = [row for row in read_metrics(run.metrics) if "reward" in row]
    assert [(row["reward"], row["equal_groups"], row["grad_norm"]) for row in rows] == [(1.0, 1.0, 0.0)] * 2
    assert all(np.isfinite(row["loss"]) for row in rows)


def test_truncated_answers_can_be_left_out(training, tmp_path, monkeypatch):
    config = replace(training.config, keep_truncated=False)
    short = answered(training, [[0.0, 1, 1, 0], [0, 0, 0, 1]])
    long = answered(training, [[0.0, 1, 1, 0], [0, 0, 0, 1]], ended=False)
    mixed = [[*short[0][:2], *long[0][2:]], long[1]]
    learned = learned_groups(mixed, training.data.prompts, config, shared=True)
    assert [len(each.advantages) for each in learned] == [2]
    own = replace(training, config=config)
    with feed_of(own, tmp_path) as feed:
        monkeypatch.setattr(feed._sampler, "sample", lambda step, params: mixed)
        inputs = feed.take(0, own.state)
        assert float(inputs.divisor.sum()) == sum(len(answer.tokens) for answer in short[0][:2])
        monkeypatch.setattr(feed._sampler, "sample", lambda step, params: long)
        state, metrics = own.step(own.state, feed.take(1, own.state))
    assert float(metrics.grad_norm) == 0
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state.params.steering))


def test_few_shapes_are_compiled(training):
    shapes = set()
    for count in range(1, 60):
        groups = answered(training, [[0.0, 1, 1, 0]] * count)
        learned = learned_groups(groups, training.data.prompts, training.config, shared=True)
        shapes.add(microbatches_of(learned, training.config, shared=True).advantages.shape)
    assert len(shapes) <= 8


# ---- settings


def test_a_reward_that_fails_ends_the_run_with_the_example(config, own):
    with pytest.raises(ValueError, match=r"own.py:fails_later: .*letters\.jsonl:\d+.*RuntimeError: no sense in"):
        train(replace(config, rewards=(f"{own}:fails_later",)), algorithm=FromRewards())


@pytest.fixture
def file(config, tmp_path):
    """The settings as a file."""
    file = tmp_path / "mine.yaml"
    file.write_text(yaml.safe_dump({"program": "grpo"} | to_plain(replace(config, steps=2))))
    return file


def test_settings_come_out_as_yaml_and_go_in_again(config, file, monkeypatch, capsys):
    assert load_config_file(file, GrpoConfig) == replace(config, steps=2)
    monkeypatch.setattr(sys, "argv", ["train.grpo", str(file), "--print-config"])
    with pytest.raises(SystemExit):
        run_main(grpo.main)
    file.write_text(capsys.readouterr().out)
    assert load_config_file(file, GrpoConfig) == replace(config, steps=2)


def test_commands(config, file, tmp_path, monkeypatch, capsys):
    said = command(monkeypatch, capsys, file, "--dry-run")
    assert "100 examples" in said
    assert "0 supervised" not in said
    assert "nan" not in said
    assert not Path(config.out).exists()
    assert "reward" in command(monkeypatch, capsys, file)
    command(monkeypatch, capsys, "--resume", "--extend", "--steps", 4, "--out", config.out)
    rows = read_metrics(Path(config.out) / "metrics.jsonl")
    assert [row["step"] for row in rows if "reward" in row] == [1, 2, 3, 4]
    assert json.loads((Path(config.out) / "summary.json").read_text())["step"] == 4
    wrong = command(monkeypatch, capsys, file, "--rewards", "exakt", "--out", tmp_path / "x", fails=True)
    assert wrong.startswith("error: --rewards exakt: no such reward")
