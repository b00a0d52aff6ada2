"""Learning from a teacher, end to end on a tiny model."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_model import TINY
from tiny_tokenizer import tiny_tokenizer

from jaxsteer import Model, forward
from jaxsteer.io import load_model, load_steering, save_hf, save_steering
from jaxsteer.models.transformer import init_base, logits_of, output_embedding
from jaxsteer.optim import OptimConfig
from jaxsteer.params import Params
from jaxsteer.types import Batch
from train.cli import run_main
from train.config import TrainConfig
from train.config.distill import DistillConfig, Teacher
from train.data import Example, Turn
from train.distill import main
from train.report.page import make_page
from train.run import preview
from train.run import training as setup
from train.run.from_teacher import FromTeacher
from train.run.loop import train
from train.run.metrics import read_metrics
from train.run.start import load_training, prepare
from train.run.taught import prompted, read_taught, shots_of
from train.tasks import JsonlTask

SHARED = pytest.mark.xdist_group("distill")  # the tests share a finished run


@pytest.fixture(scope="module")
def settings(tiny_folder, tiny_data):
    return DistillConfig(
        task=JsonlTask(str(tiny_data), validation=str(tiny_data), test=str(tiny_data), max_new_tokens=2),
        teacher=Teacher(shots=3),
        model=str(tiny_folder),
        plan=("nonlinear(rank=4) @ block",),
        optim=OptimConfig(lr=5e-2),
        steps=12,
        batch_size=4,
        sequence_length=32,
        grad_accumulation=2,
        evaluate_every=6,
        validation_examples=8,
        test_examples=8,
        eval_batch_size=8,
        checkpoint_every=4,
    )


@pytest.fixture
def config(settings, tmp_path):
    return replace(settings, out=str(tmp_path / "run"))


@pytest.fixture(scope="module")
def finished(settings, tmp_path_factory):
    return train(replace(settings, out=str(tmp_path_factory.mktemp("taught") / "run")), algorithm=FromTeacher())


@pytest.fixture(scope="module")
def text_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("context") / "context.txt"
    path.write_text("a list of letters:\n")
    return str(path)


def parts(config):
    return load_training(prepare(config, None, {}, FromTeacher()))


def kl(config, params=None, split="validation"):
    training = parts(config)
    params = Params(None, training.untouched().steering if params is None else params)
    return FromTeacher().measure(training)(split, params)["teacher_kl"]


@SHARED
def test_a_run_comes_nearer_to_its_teacher(settings, finished):
    run = finished.run
    rows = read_metrics(run.metrics)
    by_step = {row["step"]: row["teacher_kl"] for row in rows if "validation_loss" in row}
    assert list(by_step) == [0, 6, 12]
    assert by_step[12] < 0.7 * by_step[0]
    test = json.loads(run.summary.read_text())["test"]
    assert test["after"]["teacher_kl"] < 0.7 * test["before"]["teacher_kl"]
    answers = [json.loads(line) for line in (run.folder / "answers_teacher.jsonl").read_text().splitlines()]
    assert len(answers) == 8
    assert test["before"]["teacher_accuracy"] == np.mean([answer["correct"] for answer in answers])
    shots = "".join("".join(turn.text for turn in shot.turns) + "\n" for shot in shots_of(settings))
    assert answers[0]["prompt"] == f"{shots}a>"


@SHARED
def test_the_report_shows_the_teacher(finished):
    page = make_page([str(finished.run.folder)], 10)
    assert ">KL from the teacher" in page
    assert "test KL from the teacher" in page
    assert 'class="problem"' not in page


def distributions(model, base, steering, text, count):
    """Log-probabilities of the last `count` tokens of a text of bytes, [count, V]."""
    ids = np.array(tiny_tokenizer()(text)["input_ids"] + [0])[None]
    positions = np.arange(ids.size)[None]
    ones = np.ones_like(ids)
    batch = Batch(
        ids, ones, positions, ones * (ids.size - count), positions >= ids.size - count, np.ones(ids.shape, np.float32)
    )
    hidden = forward(model, base, steering, jax.tree.map(jnp.asarray, batch)).hidden[0, -count - 1 : -1]
    return np.asarray(jax.nn.log_softmax(logits_of(hidden, output_embedding(base))), np.float64)


@SHARED
@pytest.mark.parametrize("pack", [True, False])
def test_the_figure_is_that_of_two_passes(config, finished, text_file, pack):
    """Packed rows with a shared context, against each example by itself, in fp64 after the models."""
    config = replace(config, pack=pack, teacher=Teacher(shots=3, context=text_file, separator=" "))
    training, steering = parts(config), load_steering(finished.run.steering).steering
    base, model = training.loaded.base, training.program.model
    before = Path(text_file).read_text() + "".join(
        "".join(t.text for t in shot.turns) + " " for shot in shots_of(config)
    )
    found = []
    for example in config.task.load("validation")[:8]:
        text = "".join(turn.text for turn in example.turns)
        p = distributions(Model(TINY, ()), base, {}, before + text, 2)
        q = distributions(model, base, steering, text, 2)
        found += (np.exp(p) * (p - q)).sum(axis=-1).tolist()
    assert FromTeacher().measure(training)("validation", Params(None, steering))["teacher_kl"] == pytest.approx(
        np.mean(found), rel=1e-4
    )


@SHARED
def test_a_killed_run_resumes_with_the_same_bits(config, finished, monkeypatch):
    def dying(*args):
        if args[2] == 7:
            raise KeyboardInterrupt
        return original(*args)

    original = setup.step_batch
    monkeypatch.setattr(setup, "step_batch", dying)
    with pytest.raises(KeyboardInterrupt):
        train(config, algorithm=FromTeacher())
    monkeypatch.undo()
    resumed = train(replace(config, resume=True), algorithm=FromTeacher())
    pairs = zip(
        *(jax.tree.leaves(load_steering(run.steering).steering) for run in (finished.run, resumed.run)), strict=True
    )
    for one, other in pairs:
        np.testing.assert_array_equal(np.asarray(one), np.asarray(other))
    losses = lambda run: [row["loss"] for row in read_metrics(run.metrics) if "loss" in row]
    assert losses(finished.run) == losses(resumed.run)


@SHARED
def test_another_steering_teaches_its_own_predictions(config, finished):
    """KL 0 where the student is the teacher; and with worked examples besides, it is not."""
    taught = replace(config, teacher=Teacher(steering=str(finished.run.folder)))
    own = load_steering(finished.run.steering).steering
    assert kl(taught) > 1e-4
    assert kl(taught, own) == pytest.approx(0, abs=1e-6)
    assert kl(replace(taught, teacher=Teacher(steering=str(finished.run.steering), shots=3)), own) > 1e-4


@SHARED
def test_the_steering_of_the_teacher_must_stay_what_it_was(config, finished, tmp_path):
    copy = tmp_path / "teacher.safetensors"
    copy.write_bytes(finished.run.steering.read_bytes())
    config = replace(config, teacher=Teacher(steering=str(copy)), steps=1, evaluate_every=0, test_examples=0)
    train(config, algorithm=FromTeacher())
    file = load_steering(copy)
    stronger = jax.tree.map(lambda leaf: 2 * leaf, file.steering)
    save_steering(copy, stronger, file.plan, model_name=file.model_name, config=TINY, sample=file.sample)
    with pytest.raises(ValueError, match=r"its training data .* had 100 examples"):
        train(replace(config, resume=True, extend=True, steps=2), algorithm=FromTeacher())


def other_model(folder, config, tokenizer):
    save_hf(folder, config, init_base(config, jax.random.key(5)), "llama", tokenizer)
    return str(folder)


def test_another_model_teaches(config, tmp_path, capsys):
    name = other_model(tmp_path / "wide", replace(TINY, layers=2, mlp_width=64), tiny_tokenizer())
    config = replace(config, teacher=Teacher(model=name), test_examples=0, steps=6)
    result = train(config, algorithm=FromTeacher())
    losses = result.losses["validation"]
    assert losses["after"]["teacher_kl"] < losses["before"]["teacher_kl"]
    assert f"Teacher: {name}, " in capsys.readouterr().out


def test_another_vocabulary_is_refused_before_weights_are_read(config, tmp_path, monkeypatch):
    monkeypatch.setattr(setup, "load", lambda *rest, **named: pytest.fail("weights were read"))
    merged = tiny_tokenizer(merges=[("a", "b")])
    larger = other_model(tmp_path / "larger", replace(TINY, vocab_size=260), merged)
    with pytest.raises(ValueError, match="has 260 tokens, the student 259"):
        train(replace(config, teacher=Teacher(model=larger)), algorithm=FromTeacher())
    swapped = tiny_tokenizer()
    vocab = json.loads(swapped.backend_tokenizer.to_str())
    ids = vocab["model"]["vocab"]
    ids["a"], ids["b"] = ids["b"], ids["a"]
    swapped._tokenizer = type(swapped.backend_tokenizer).from_str(json.dumps(vocab))
    other = other_model(tmp_path / "other", TINY, swapped)
    with pytest.raises(ValueError, match="has another tokenizer than the student"):
        train(replace(config, teacher=Teacher(model=other)), algorithm=FromTeacher())


def test_worked_examples_are_not_trained_on(config):
    model = load_model(config.model)
    shots = {shot.source for shot in shots_of(config)}
    source = read_taught(config, model, model.config, "train").source
    left = {source.student.source(i) for i in range(len(source.student))}
    texts = {shot.turns for shot in shots_of(config)}
    asked = {example.source for example in config.task.load("train") if example.turns in texts}
    assert len(shots) == 3
    assert shots <= asked
    assert not left & asked
    assert len(left) == 100 - len(asked)
    assert shots_of(config) == shots_of(config)
    assert shots_of(replace(config, seed=1)) != shots_of(config)


def test_a_chat_teacher_reads_a_system_message_and_worked_examples(config):
    config = replace(
        config,
        sequence_length=96,
        task=replace(config.task, chat=True),
        teacher=Teacher(shots=1, system="Go on."),
    )
    model = load_model(config.model)
    source = read_taught(config, model, model.config, "train").source
    (shot,), own = shots_of(config), source.student[0]
    decode = model.require_tokenizer().decode
    turn = lambda role, text: f"<|im_start|>{role}\n{text}<|im_end|>\n"
    prompt, completion = (each.text for each in shot.turns)
    before = turn("system", "Go on.") + turn("user", prompt) + turn("assistant", completion)
    assert decode(source.teacher[0].ids) == before + decode(own.ids)
    assert source.teacher[0].weights.sum() == own.weights.sum()
    assert source.context >= len(model.require_tokenizer()(before)["input_ids"])
    inputs = source.batch(0)
    assert inputs.teacher.tokens.shape == (4, source.context + 96)
    counted = lambda batch: [batch.tokens[r][batch.weights[r] != 0].tolist() for r in range(4)]
    assert counted(inputs.batch) == counted(inputs.teacher)


def test_system_messages_come_first(config):
    own = (Turn("system", "Be brief."), Turn("user", "q"), Turn("assistant", "a"))
    shots = (Turn("user", "x"), Turn("assistant", "y"))
    example = Example(own, "here")
    roles = lambda before: [(turn.role, turn.text) for turn in prompted(example, before).turns]
    answered = [("user", "x"), ("assistant", "y"), ("user", "q"), ("assistant", "a")]
    assert roles(shots) == [("system", "Be brief."), *answered]
    assert roles((Turn("system", "Go on."), *shots)) == [("system", "Go on.\n\nBe brief."), *answered]
    assert prompted(example, shots).turn_weights == (1.0, 1.0, 0.0, 1.0, 1.0)


def test_a_dry_run_counts_the_shared_base_once(config, tmp_path):
    """A teacher on the student's own base needs less memory than one with a copy of it, by the size of the base."""
    own = replace(config, out=str(tmp_path / "a"))
    copied = replace(own, teacher=replace(config.teacher, model=config.model))
    bytes_of = []
    for each in (own, copied):
        prepared = prepare(each, None, {}, FromTeacher())
        bytes_of.append(preview._compiled_memory(prepared, prepared.program))
    base = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(load_model(config.model).base))
    assert bytes_of[1] - bytes_of[0] == base


def test_completions_that_become_other_tokens_are_refused(config, tmp_path):
    """A merge across the border: `>b` is one token where the completion follows `>` in the student's prompt alone."""
    path = tmp_path / "border.jsonl"
    path.write_text("".join(json.dumps({"prompt": "", "completion": f"b{i}"}) + "\n" for i in range(4)))
    merged = other_model(tmp_path / "merged", replace(TINY, vocab_size=260), tiny_tokenizer(merges=[(">", "b")]))
    context = tmp_path / "context.txt"
    context.write_text("a>")
    config = replace(config, model=merged, task=JsonlTask(str(path)), teacher=Teacher(context=str(context)))
    config = replace(config, evaluate_every=0, test_examples=0)
    with pytest.raises(ValueError, match=r"border\.jsonl:1: .*"):
        train(config, algorithm=FromTeacher())


def test_an_example_of_an_evaluation_that_does_not_fit_stops_the_run_at_once(config, tmp_path, monkeypatch):
    monkeypatch.setattr(setup, "load", lambda *rest, **named: pytest.fail("weights were read"))
    path = tmp_path / "long.jsonl"
    path.write_text(json.dumps({"prompt": "a" * 40, "completion": "b"}) + "\n")
    with pytest.raises(ValueError, match="no example is left"):
        train(replace(config, task=replace(config.task, test=str(path))), algorithm=FromTeacher())


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--teacher.shots", "0"], "the teacher would be the student itself"),
        (["--teacher.shots", "-1"], "must be at least 0"),
        (["--teacher.shots", "100"], "there are 100 training examples in all"),
        (["--teacher.context", "nowhere.txt"], "--teacher.context nowhere.txt: no such file"),
        (["--teacher.system", "Hi."], "--teacher.system needs --task.chat"),
        (["--teacher.steering", "nowhere"], "--teacher.steering nowhere: no such file"),
        (["--teacher.model", "no/such/folder/here"], "no/such/folder/here"),
        (["--teacher.shots", "2", "--temperature", "0"], "--temperature must be above 0"),
        (["--teacher.shots", "2", "--loss-on", "all"], "only completions are learned"),
    ],
)
def test_what_no_teacher_can_be_is_told_in_a_sentence(config, options, said, monkeypatch, capsys):
    with pytest.raises(SystemExit) as end:
        run(config, [*options], monkeypatch)
    assert end.value.code
    told = " ".join((lambda out: out.out + out.err)(capsys.readouterr()).split())
    assert said in told
    assert "Traceback" not in told


CONFIG = """
from train.config.distill import DistillConfig, Teacher
from train.tasks import JsonlTask

def config():
    return DistillConfig(task=JsonlTask({data!r}), model={model!r}, teacher=Teacher(shots=1), steps=2, batch_size=2,
                         sequence_length=32, test_examples=0, out={out!r})
"""


def run(config, options, monkeypatch):
    """The command, on the tiny model."""
    file = Path(config.out).with_name("config.py")
    file.write_text(CONFIG.format(data=config.task.train, model=config.model, out=config.out))
    monkeypatch.setattr(sys, "argv", ["distill", str(file), *options])
    run_main(main)


def test_the_command(config, monkeypatch, capsys):
    run(config, ["--teacher.shots", "2", "--dry-run"], monkeypatch)
    assert "Nothing was trained" in capsys.readouterr().out
    assert not Path(config.out).exists()
    run(config, ["--teacher.shots", "2"], monkeypatch)
    settings = json.loads((Path(config.out) / "config.json").read_text())
    assert (settings["program"], settings["teacher"]["shots"]) == ("distill", 2)
    assert not isinstance(TrainConfig(), DistillConfig)
