"""Learning from preferences end to end on a tiny model."""

import importlib
import json
import sys
from dataclasses import replace

import jax
import numpy as np
import pytest

from jaxsteer.batches import stack_rows
from jaxsteer.io import load_steering
from jaxsteer.objectives.objective import policy_log_probabilities
from jaxsteer.optim import OptimConfig
from jaxsteer.params import Params
from train.cli import run_main
from train.config import parse_run, plain_run
from train.config.dpo import DpoConfig, PreferenceLoss
from train.report.page import make_page
from train.run import loop, reference
from train.run.folder import RunFolder
from train.run.metrics import read_metrics
from train.run.preferences import FromPreferences, PairMeasure
from train.run.start import load_training, prepare
from train.tasks import JsonlTask, PreferenceTask

pytestmark = pytest.mark.xdist_group("dpo")


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """The letter after a letter, rather than the one before."""
    path = tmp_path_factory.mktemp("pairs") / "pairs.jsonl"
    rows = [
        {"prompt": f"{chr(98 + i % 24)}>", "chosen": f"{chr(99 + i % 24)}.", "rejected": f"{chr(97 + i % 24)}?!"}
        for i in range(60)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def settings(tiny_folder, pairs):
    return DpoConfig(
        task=PreferenceTask(str(pairs), validation=str(pairs), max_new_tokens=2),
        model=str(tiny_folder),
        plan=("nonlinear(rank=4) @ block",),
        optim=OptimConfig(lr=2e-2),
        preference=PreferenceLoss(beta=1.0),
        steps=8,
        batch_size=4,
        sequence_length=32,
        grad_accumulation=2,
        evaluate_every=4,
        validation_examples=12,
        test_examples=12,
        checkpoint_every=4,
        show_answers=0,
    )


def run(config, out):
    loop.train(replace(config, out=str(out)), algorithm=FromPreferences())
    return RunFolder(out)


def losses(folder):
    return [row["loss"] for row in read_metrics(folder.metrics) if "loss" in row]


def leaves(folder):
    return jax.tree.leaves(load_steering(folder.steering).steering)


@pytest.fixture(scope="module")
def finished(settings, tmp_path_factory):
    return run(settings, tmp_path_factory.mktemp("dpo") / "run")


def test_it_learns_from_the_reference_on(finished, settings):
    """The first loss is log 2; the margin is positive in the end, and chosen answers gained on rejected ones."""
    assert losses(finished)[0] == pytest.approx(np.log(2), abs=1e-6)
    summary = json.loads(finished.summary.read_text())
    assert summary["test"]["before"]["margin"] == pytest.approx(0, abs=1e-6)
    assert summary["test"]["after"]["margin"] > 0
    assert summary["test"]["after"]["pair_accuracy"] > 0.8
    evaluated = [row for row in read_metrics(finished.metrics) if "validation_loss" in row]
    assert [row["step"] for row in evaluated] == [0, 4, 8]
    assert evaluated[-1]["pair_accuracy"] > evaluated[0]["pair_accuracy"]
    stored = json.loads(finished.config.read_text())
    assert (stored["program"], stored["select_by"]) == ("dpo", "auto")
    assert parse_run(stored, "here").preference == settings.preference
    assert parse_run(plain_run(settings), "here") == settings


def test_the_report_shows_pairs(finished):
    page = make_page([str(finished.folder)], 10)
    for title in ("Pairs right", "Margin", "Chosen answers", "Loss of the objective", "Loss of reference completions"):
        assert f">{title}" in page
    assert "test pairs right" in page
    assert 'class="problem"' not in page


def test_pairs_decide_when_a_run_ends(settings, tmp_path, monkeypatch):
    """The best of its evaluations is kept."""
    rates, seen = iter([0.5, 0.9, 0.6, 0.7]), []

    def measured(self, split, params):
        seen.append(jax.device_get(params.steering))
        return {"pair_accuracy": next(rates)}

    monkeypatch.setattr(PairMeasure, "__call__", measured)
    folder = run(replace(settings, evaluate_every=2, patience=2, test_examples=0), tmp_path / "run")
    assert len(losses(folder)) == 6
    for kept, best in zip(leaves(folder), jax.tree.leaves(seen[1]), strict=True):
        np.testing.assert_array_equal(kept, best)


def test_its_folder_is_evaluated_and_a_dry_run_writes_nothing(finished, settings, pairs, tmp_path, monkeypatch, capsys):
    command = lambda module, *words: (
        monkeypatch.setattr(sys, "argv", [module, *map(str, words)]),
        run_main(importlib.import_module(f"train.{module}").main),
        capsys.readouterr().out,
    )[-1]
    assert "accuracy" in command("evaluate", finished.folder, "--data", pairs, "--examples", 4)
    sizes = ("--model", settings.model, "--sequence-length", 32, "--batch-size", 2, "--steps", 2)
    said = command("dpo", "preferences", "--task.train", pairs, *sizes, "--out", tmp_path / "none", "--dry-run")
    assert "Nothing was trained" in said
    assert not (tmp_path / "none").exists()


def test_the_reference_is_computed_once(settings, finished, tmp_path, monkeypatch):
    """A run killed while it is computed goes on from there; one killed later does not compute it again."""
    scored, steps = reference._scored, []

    def counted(training, params, source, step):
        if source is training.data:
            if len(steps) == 2 and step == 2:
                steps.append("killed")
                raise KeyboardInterrupt
            steps.append(step)
        return scored(training, params, source, step)

    monkeypatch.setattr(reference, "_scored", counted)
    monkeypatch.setattr(reference, "SAVED_EVERY", 1)
    with pytest.raises(KeyboardInterrupt):
        run(settings, tmp_path / "run")
    resumed = run(replace(settings, resume=True), tmp_path / "run")
    assert steps[:4] == [0, 1, "killed", 2]
    assert len(steps) == len(set(steps))
    for one, other in zip(leaves(resumed), leaves(finished), strict=True):
        np.testing.assert_array_equal(one, other)


def test_sharing_prompts_changes_nothing_but_rounding(settings, finished, tmp_path):
    bare = replace(settings, evaluate_every=0, test_examples=0, pack=False)
    shared, apart = (run(replace(bare, share_prompts=share), tmp_path / str(share)) for share in (True, False))
    np.testing.assert_allclose(losses(shared), losses(apart), rtol=1e-4)
    tokens = [sum(row["tokens"] for row in read_metrics(folder.metrics)) for folder in (shared, apart)]
    assert tokens[0] < tokens[1]


def test_a_start_is_the_reference_of_two_explicit_models(settings, finished, tmp_path):
    """Each step's loss is that of the pairs one by one, by the present policy and by the file that it began with."""
    file = load_steering(finished.steering)
    config = replace(settings, start_from=str(finished.folder), steps=3, evaluate_every=0, test_examples=0)
    config = replace(config, grad_accumulation=1, batch_size=2, out=str(tmp_path / "run"))
    training = load_training(prepare(config, None, {}, FromPreferences()))
    model, base, source = training.program.model, training.loaded.base, training.data
    score = jax.jit(lambda steering, rows: policy_log_probabilities(model, base, steering, rows).sum(axis=1))
    alone = lambda side, numbers: stack_rows([[side[i]] for i in numbers], 8)  # unpacked
    state, folder = training.state, RunFolder(tmp_path)
    with FromPreferences().feed(training, folder, range(3)) as feed:
        for step in range(3):
            policy, numbers = training.answering(state).steering, np.concatenate(source.order.members(step)).tolist()
            sides = [alone(side, numbers + [0] * (16 - len(numbers))) for side in (source.chosen, source.rejected)]
            gained, lost = (np.asarray(score(policy, rows) - score(file.steering, rows)) for rows in sides)
            margins = (gained - lost)[: len(numbers)]
            state, metrics = training.step(state, feed.take(step, state))
            assert float(metrics.loss) == pytest.approx(np.mean(np.logaddexp(0, -margins)), rel=1e-4)
            assert (step == 0) == (float(metrics.loss) == pytest.approx(np.log(2), abs=1e-6))


def test_steering_that_a_caller_starts_from_is_the_reference(settings, finished, tmp_path):
    config = replace(settings, steps=1, evaluate_every=0, test_examples=0, out=str(tmp_path / "run"))
    loop.train(config, load_steering(finished.steering).steering, FromPreferences())
    assert losses(RunFolder(tmp_path / "run"))[0] == pytest.approx(np.log(2), abs=1e-6)


def test_steering_that_works_in_both_directions(settings, tmp_path):
    """BiPO: the margin of the same steering at strength -1 is the opposite in sign."""
    loss = PreferenceLoss(beta=1.0, bidirectional=True)
    config = replace(settings, preference=loss, plan=("fixed @ block",), grad_accumulation=1, steps=16, test_examples=0)
    config = replace(config, evaluate_every=0, optim=OptimConfig(lr=5e-2), out=str(tmp_path / "run"))
    steering = loop.train(config, algorithm=FromPreferences()).params.steering
    training = load_training(prepare(replace(config, out=str(tmp_path / "other")), None, {}, FromPreferences()))
    measure = FromPreferences().measure(replace(training, config=replace(config, evaluate_every=1)))
    margin = lambda sign: measure("validation", Params(None, jax.tree.map(lambda x: sign * x, steering)))["margin"]
    assert margin(1) > 0.05
    assert margin(-1) < -0.05


def test_pairs_of_an_evaluation_are_checked_before_weights_are_read(settings, tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "load_training", lambda *rest: pytest.fail("weights were read"))
    path = tmp_path / "held_out.jsonl"
    path.write_text(json.dumps({"prompt": "p", "chosen": "a", "rejected": "a"}) + "\n")
    with pytest.raises(ValueError, match=r"held_out\.jsonl:1: .* are the same answer"):
        run(replace(settings, task=replace(settings.task, test=str(path))), tmp_path / "run")


@pytest.mark.parametrize("kind", ["ipo", "simpo", "kto"])
def test_other_losses(settings, tmp_path, kind):
    loss = PreferenceLoss(kind, beta=0.5)
    folder = run(replace(settings, preference=loss, grad_accumulation=1, evaluate_every=8), tmp_path / "run")
    assert losses(folder)[-1] < losses(folder)[0]
    if kind == "ipo":
        assert losses(folder)[0] == pytest.approx(1.0)
    assert (folder.folder / "reference.f32").exists() == (kind != "simpo")


def test_judged_answers(settings, tmp_path):
    data = tmp_path / "judged.jsonl"
    rows = [
        {"prompt": f"{chr(97 + i % 25)}>", "completion": "y" if i % 3 else "n", "label": i % 3 > 0} for i in range(30)
    ]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = PreferenceTask(str(data), max_new_tokens=2)
    config = replace(settings, task=task, preference=PreferenceLoss("kto"), evaluate_every=0, test_examples=0)
    config = replace(config, steps=None, epochs=2.0)
    folder = run(config, tmp_path / "run")
    assert losses(folder)[-1] < losses(folder)[0] == pytest.approx(0.5)
    with pytest.raises(ValueError, match=r"no pairs; answers that are judged one by one are for --preference.kind kto"):
        run(replace(config, preference=PreferenceLoss()), tmp_path / "pairs")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"task": None}, "a JsonlTask has no preferences"),
        ({"preference": PreferenceLoss(bidirectional=True), "plan": ("lora @ attn.q",)}, "lora updates weights"),
        ({"preference": PreferenceLoss(bidirectional=True), "train_base": True}, "has no other direction"),
        ({"loss_on": "all"}, "--loss-on all"),
        ({"select_by": "teacher_kl"}, "jaxsteer dpo measures accuracy, validation_loss, pair_accuracy"),
        ({"on_long": "cut"}, "--on-long cut"),
    ],
)
def test_what_no_run_can_be(settings, tiny_data, tmp_path, monkeypatch, changes, said):
    monkeypatch.setattr(loop, "load_training", lambda *rest: pytest.fail("weights were read"))
    if "task" in changes:
        changes = {"task": JsonlTask(str(tiny_data)), "validation_share": 0.1}
    with pytest.raises(ValueError, match=said):
        run(replace(settings, **changes), tmp_path / "run")


@pytest.mark.parametrize(
    ("loss", "said"),
    [
        ({"kind": "hinge"}, "use sigmoid, ipo, simpo, kto"),
        ({"beta": 0.0}, "must be above 0"),
        ({"kind": "ipo", "margin": 1.0}, "--preference.margin is for --preference.kind simpo only"),
    ],
)
def test_losses_that_do_not_exist(loss, said):
    with pytest.raises(ValueError, match=said):
        PreferenceLoss(**loss)


def test_a_folder_is_resumed_by_its_own_command(finished):
    from train.cli import from_command_line
    from train.dpo import DpoCommand
    from train.sft import SftConfig

    argv = ["--resume", "--out", str(finished.folder)]
    assert from_command_line("dpo", "", DpoCommand, argv).run.preference.beta == 1.0
    with pytest.raises(ValueError, match="is a run of jaxsteer dpo; resume it with that command"):
        from_command_line("sft", "", SftConfig, argv)
    with pytest.raises(ValueError, match="dpo_listops: holds the settings of jaxsteer dpo, not of jaxsteer sft"):
        from_command_line("sft", "", SftConfig, ["dpo_listops"])
