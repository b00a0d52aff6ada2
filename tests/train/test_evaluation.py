"""Evaluation: answers in full rows and by choice, on disk, resumed, compared, tabled."""

import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent / "data"))
from tiny_tokenizer import tiny_tokenizer

from jaxsteer import Model, Params, init_steering, mean_loss, parse_plan
from jaxsteer.inference import Likelihood
from jaxsteer.io import load_model, save_steering
from jaxsteer.io.files import write_json
from jaxsteer.models.transformer import forward, logits_of, output_embedding
from train import evaluate
from train.data import Encoding, Example, TokenizedExample, encode, stack_rows
from train.devices.placement import SINGLE, place_on
from train.evaluation import evaluator as evaluating
from train.evaluation.answers import (
    Prompts,
    ScoredAnswer,
    chosen_reader,
    make_prompts,
    read_answers,
    summarise,
)
from train.evaluation.divergence import divergences
from train.evaluation.evaluator import Evaluator
from train.evaluation.journal import FileJournal, MemoryJournal
from train.evaluation.loss import predicted_tokens
from train.robustness import RobustnessConfig, example_sets, measure, read_methods, table_of
from train.tasks import JsonlTask

ROOT = Path(__file__).parents[2]
PLAN = ("nonlinear(rank=4) @ block",)
TASK = JsonlTask("none", max_new_tokens=4)


@pytest.fixture(scope="module")
def loaded(tiny_folder):
    return load_model(tiny_folder)


@pytest.fixture(scope="module")
def steered(loaded):
    plan = parse_plan(PLAN, loaded.config)
    zeros = init_steering(plan, loaded.config, jax.random.key(0))
    draw = np.random.default_rng(0)
    return plan, jax.tree.map(lambda x: x + draw.normal(0, 0.3, x.shape).astype(np.float32), zeros)


@pytest.fixture(scope="module")
def steering_file(steered, loaded, tiny_folder, tiny_data, tmp_path_factory):
    plan, steering = steered
    path = tmp_path_factory.mktemp("steered") / "one" / "steering.safetensors"
    path.parent.mkdir()
    task = {"type": "JsonlTask", "train": str(tiny_data), "validation": str(tiny_data), "max_new_tokens": 4}
    task |= {"keys": {}}
    save_steering(
        path, steering, plan, model_name=str(tiny_folder), config=loaded.config, notes={"config": {"task": task}}
    )
    return path


def letters(count=11):
    return [Example.of(f"{'xyz'[: 1 + i % 3]}{chr(97 + i)}>", None, f"letters:{i}", chr(98 + i)) for i in range(count)]


def said(answers):
    """Answers without their margins, which round as the rows around them do."""
    return [replace(answer, margin=None) for answer in answers]


def evaluator_of(loaded, plan=(), **settings):
    settings = {"task": TASK, "eval_batch_size": 4} | settings
    return Evaluator(Model(loaded.config, plan), loaded, placement=place_on(SINGLE, 4), **settings)


def test_answers_come_in_order_and_say_how_sure_they_are(loaded, steered, monkeypatch):
    plan, steering = steered
    evaluator, kept = evaluator_of(loaded, plan), []
    add = MemoryJournal.add
    monkeypatch.setattr(
        MemoryJournal, "add", lambda self, index, answer: (kept.append(index), add(self, index, answer))
    )
    answers = evaluator.answer(letters(), Params(None, steering))
    assert [each.source for each in answers] == [f"letters:{i}" for i in range(11)]
    assert sorted(kept) == list(range(11))
    assert all(each.margin >= 0 and each.truncated for each in answers)
    # What is known already is not asked again.
    kept.clear()
    known = MemoryJournal()
    known.done[3] = replace(answers[3], output="known")
    monkeypatch.setattr(Evaluator, "_journal", lambda self, *rest: known)
    again = evaluator.answer(letters(), Params(None, steering))
    assert again[3].output == "known"
    assert said(again[:3] + again[4:]) == said(answers[:3] + answers[4:])
    assert sorted(kept) == [i for i in range(11) if i != 3]


def test_a_split_is_read_and_tokenised_once(loaded, steered, tiny_data, monkeypatch):
    plan, steering = steered
    task = JsonlTask(str(tiny_data), validation=str(tiny_data), max_new_tokens=4)
    reads = []
    load = JsonlTask.load
    monkeypatch.setattr(JsonlTask, "load", lambda self, split: (reads.append(split), load(self, split))[1])
    evaluator = evaluator_of(loaded, plan, task=task, limits={"validation": 6, "test": 0})
    first = evaluator.validate(Params(None, steering))
    assert set(first.results) == {"validation_loss", "perplexity", "token_accuracy", "accuracy", "low", "high"}
    assert evaluator.validate(Params(None, steering)) == first
    assert len(evaluator.answer("validation", Params(None, steering))) == 6
    assert evaluator.answer("test", Params(None, steering)) == []
    assert reads == ["validation"]


loss_of = jax.jit(mean_loss, static_argnums=0)


def test_predicted_tokens_are_the_greedy_ones(loaded, steered):
    """Packed rows whose completions are greedy up to some token, against forward passes one by one."""
    plan, steering = steered
    model, draw = Model(loaded.config, plan), np.random.default_rng(0)
    head, examples, expected = output_embedding(loaded.base), [], []
    step = jax.jit(lambda batch: forward(model, loaded.base, steering, batch).hidden @ head.T)
    for wrong in (None, 2, 0, None, 1):
        example = TokenizedExample(draw.integers(97, 122, 9).astype(np.int32), np.arange(9) >= 5, 5, "")
        for place in range(5, 9):  # each depends on those before
            likeliest = int(step(stack_rows([[example]], 9))[0, place - 1].argmax())
            example.ids[place] = likeliest if place - 5 != wrong else (likeliest + 1) % 256
        examples.append(example)
        expected.append([place < 5 or place - 5 != wrong for place in range(9)])
    packed = predicted_tokens(model, loaded.base, steering, stack_rows([examples[:3], examples[3:]], 30))
    found = np.asarray(packed)
    np.testing.assert_array_equal(found[0], [*np.concatenate(expected[:3]), *[True] * 3])
    np.testing.assert_array_equal(found[1], [*np.concatenate(expected[3:]), *[True] * 12])


def test_examples_are_found_in_packed_rows(loaded, steered, tiny_data, monkeypatch):
    even = lambda model, base, steering, batch, strength: (batch.tokens % 2 == 0) | (batch.weights == 0)
    monkeypatch.setattr(evaluating, "predicted_tokens", even)
    task = JsonlTask(str(tiny_data), validation=str(tiny_data), max_new_tokens=4)
    plan, steering = steered
    asking = evaluator_of(loaded, plan, task=task, loss_shape=(4, 32))
    encoded, _ = encode(task.load("validation"), loaded.require_tokenizer(), Encoding())
    expected = [bool((example.ids[example.weights != 0] % 2 == 0).all()) for example in encoded]
    assert asking.predicted("validation", Params(None, steering)) == expected
    assert len(set(expected)) == 2


def test_an_example_whose_completion_does_not_count_is_not_right(loaded, steered):
    plan, steering = steered
    unanswered = [Example.of("ab", "c", "first"), replace(Example.of("ab", "c", "second"), weight=0.0)]
    asking = evaluator_of(loaded, plan, loss_shape=(2, 32)).knowing({"validation": unanswered})
    with pytest.raises(ValueError, match="second: has no completion that counts"):
        asking.predicted("validation", Params(None, steering))


def test_the_validation_loss_is_that_of_training(loaded, steered, tiny_data):
    """Packed rows, several batches, the last of them not full; a base of one's own counts."""
    plan, steering = steered
    task = JsonlTask(str(tiny_data), validation=str(tiny_data), max_new_tokens=4)
    evaluator = evaluator_of(
        loaded, plan, task=task, limits={"validation": 13}, metric="validation_loss", loss_shape=(2, 8)
    )
    rows, _ = encode(task.load("validation")[:13], loaded.tokenizer)
    batch = jax.tree.map(jax.numpy.asarray, stack_rows([[row] for row in rows], 8))
    for base in (None, jax.tree.map(lambda leaf: leaf * 0.5, loaded.base)):
        whole = loaded.base if base is None else base
        model = Model(loaded.config, plan)
        want = loss_of(model, whole, steering, batch)
        got = evaluator.validate(Params(base, steering)).results
        np.testing.assert_allclose(got["validation_loss"], want, rtol=1e-5)
        np.testing.assert_allclose(got["perplexity"], np.exp(want), rtol=1e-5)
        logits = np.asarray(forward(model, whole, steering, batch).hidden) @ np.asarray(whole["embed"]["embedding"]).T
        right = logits[:, :-1].argmax(-1) == np.asarray(batch.tokens)[:, 1:]
        assert got["token_accuracy"] == right[np.asarray(batch.weights)[:, 1:] > 0].mean()


whole_text = jax.jit(forward, static_argnums=0)

CHOICES = (" b", " cd", " efgh")


def test_choices_score_as_completions_in_training_do(loaded, steered):
    plan, steering = steered
    model, params = Model(loaded.config, plan), Params(None, steering)
    examples = [Example.of(f"{chr(97 + i)}>", CHOICES[i], f"letters:{i}", choices=CHOICES) for i in range(3)]
    choose = lambda **how: evaluator_of(loaded, plan, by="likelihood", eval_batch_size=2, **how).answer(
        examples, params
    )
    answers = choose()
    for example, answer in zip(examples, answers, strict=True):
        for choice, got in zip(CHOICES, answer.scores, strict=True):
            trained, _ = encode([Example.of(example.turns[0].text, choice, "here")], loaded.tokenizer)
            batch = stack_rows([trained], 16)
            hidden = whole_text(model, loaded.base, steering, jax.tree.map(jax.numpy.asarray, batch)).hidden[0]
            logp = jax.nn.log_softmax(logits_of(hidden, output_embedding(loaded.base)))
            supervised = np.flatnonzero(batch.weights[0])
            assert len(supervised) == len(choice) + 1  # bytes, and the end of the sequence
            want = sum(float(logp[t - 1, batch.tokens[0, t]]) for t in supervised)
            np.testing.assert_allclose(got, want, atol=1e-4)
        assert answer.output == CHOICES[int(np.argmax(answer.scores))]
        assert answer.correct == (answer.output == example.turns[1].text)
    sizes = {"tokens": [3, 4, 6], "characters": [2, 3, 5]}
    for normalise, size in sizes.items():
        for plain, each in zip(answers, choose(normalise=normalise), strict=True):
            np.testing.assert_allclose(each.scores, np.divide(plain.scores, size), rtol=1e-5)
            assert each.output == CHOICES[int(np.argmax(each.scores))]


@pytest.fixture
def dated(loaded):
    """A model whose chat template prints the date."""
    template = "{{ strftime_now('%Y-%m-%d') }}{% for m in messages %}{{ m['content'] }}<|im_end|>{% endfor %}"
    return replace(loaded, tokenizer=tiny_tokenizer(template=template))


def test_a_steering_file_is_evaluated_on_the_date_of_its_training(
    loaded, dated, steered, tiny_data, tmp_path, monkeypatch
):
    task = {"type": "JsonlTask", "train": str(tiny_data), "test": str(tiny_data), "chat": True, "keys": {}}
    notes = {"config": {"task": task}, "date": "2024-07-04"}
    path, (plan, steering) = tmp_path / "steering.safetensors", steered
    save_steering(path, steering, plan, model_name="tiny", config=loaded.config, notes=notes)
    monkeypatch.setattr(evaluate, "load_steered", lambda *rest, **options: (dated, None))
    seen = []
    monkeypatch.setattr(Evaluator, "answer", lambda self, some, *rest, **options: seen.extend(self.prompts(some).texts))
    monkeypatch.setattr(evaluate, "_report", lambda *rest: None)
    monkeypatch.setattr(sys, "argv", ["evaluate", str(path), "--examples", "2"])
    evaluate.main()
    assert seen[:2] == ["2024-07-04a><|im_end|>", "2024-07-04b><|im_end|>"]


def test_examples_without_an_answer_are_not_marked_wrong(tmp_path, capsys):
    data = tmp_path / "data.jsonl"
    data.write_text('{"text": "ab"}\n{"text": "bc"}\n')
    config, task = evaluate.EvaluateConfig("none"), JsonlTask(str(data), test=str(data))
    with pytest.raises(ValueError, match=r"data.jsonl:1: no answer to compare with, nor has any other of the 2"):
        evaluate.read_examples(config, task)
    with data.open("a") as file:
        file.write('{"prompt": "a>", "completion": "b"}\n')
    assert [example.gold for example in evaluate.read_examples(config, task)] == ["b"]
    assert "2 of 3 examples have no answer, and are left out" in capsys.readouterr().err


def test_a_full_disk_is_named(tmp_path, monkeypatch):
    with FileJournal(tmp_path / "a.jsonl", {}) as journal, open("/dev/full", "a") as full:
        monkeypatch.setattr(journal, "_file", full)
        with pytest.raises(OSError, match=r"No space left on device: '.*a.jsonl.unfinished'"):
            journal.add(0, ScoredAnswer("a", "b", "b", "b", True, False, "here"))
    (tmp_path / f".summary.json.{os.getpid()}.partial").symlink_to("/dev/full")
    with pytest.raises(OSError, match=r"No space left on device: '.*summary.json'"):
        write_json(tmp_path / "summary.json", {"a": 1})
    assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl.unfinished"]


def test_prompts_are_encoded_as_the_training_says(loaded, dated, steered):
    task, encoding = replace(TASK, chat=True), Encoding(chat=True, date="2024-07-04", max_length=3)
    evaluator = Evaluator(Model(loaded.config, steered[0]), dated, task, SINGLE, by="likelihood", encoding=encoding)
    prompts = evaluator.prompts([Example.of("a>", "b", "here", choices=("b", "c"))])
    assert prompts.texts == ("2024-07-04a><|im_end|>",)
    assert [dated.tokenizer.decode(ids) for ids in prompts.choice_ids[0]] == ["b<|im_end|>", "c<|im_end|>"]


def test_choices_that_cannot_be_scored_raise(loaded):
    make = lambda example: make_prompts([example], loaded.tokenizer, Encoding(), loaded.stop_tokens, TASK, choices=True)
    with pytest.raises(ValueError, match="here: has no choices"):
        make(Example.of("a", "b", "here"))
    with pytest.raises(ValueError, match="here: the answer 'x' is none of"):
        make(Example.of("a", "x", "here", choices=("b", "c")))


def test_a_killed_evaluation_goes_on(loaded, steered, tmp_path, monkeypatch):
    plan, steering = steered
    path = tmp_path / "answers.jsonl"
    params = Params(None, steering)
    evaluator = evaluator_of(loaded, plan)
    ask = lambda out, count=11, **rest: evaluator.answer(letters(count), params, out, **rest)
    whole = ask(tmp_path / "whole.jsonl")
    keep, count = FileJournal.add, []

    def dying(self, index, answer):
        if len(count) == 5:
            raise KeyboardInterrupt
        count.append(index)
        keep(self, index, answer)

    monkeypatch.setattr(FileJournal, "add", dying)
    with pytest.raises(KeyboardInterrupt):
        ask(path)
    monkeypatch.setattr(
        FileJournal, "add", lambda self, index, answer: (count.append(index), keep(self, index, answer))
    )
    part = tmp_path / "answers.jsonl.unfinished"
    assert len(part.read_text().splitlines()) == 6
    with part.open("a") as file:
        file.write('{"index": 10, "prom')  # killed in the middle of a line
    header = json.loads(part.read_text().splitlines()[0])["evaluation"]
    with pytest.raises(ValueError, match="unfinished evaluation with another by"):
        FileJournal(path, {**header, "by": "likelihood"})
    assert said(ask(path)) == said(whole)
    assert sorted(count) == list(range(11))  # each was asked once
    assert not part.exists()
    finished = read_answers(path)
    assert said(finished) == said(read_answers(tmp_path / "whole.jsonl")) == said(whole)
    # What is there is read, if it is the same; otherwise asked anew.
    count.clear()
    assert ask(path, reuse=True) == finished
    assert not count
    ask(path, 5, reuse=True)
    assert len(count) == 5


def test_the_program_is_killed_and_goes_on(steering_file, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    command = [sys.executable, "-m", "train.evaluate", str(steering_file), "--examples", "60", "--batch-size", "2"]
    command += ["--no-base", "--out", str(out)]
    part = out / "steered.jsonl.unfinished"
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    while process.poll() is None and not (part.exists() and part.read_bytes().count(b"\n") > 8):
        time.sleep(0.005)
    process.kill()
    process.communicate()
    assert part.exists(), "it was finished before it could be killed"
    before = part.read_text().splitlines()[1:-1]
    monkeypatch.setattr(sys, "argv", command[2:])
    evaluate.main()
    answers = {each.source: each for each in read_answers(out / "steered.jsonl")}
    assert len(answers) == 60
    for line in before:
        row = json.loads(line)
        assert answers[row["source"]].output == row["output"]
    monkeypatch.setattr(sys, "argv", [*command[2:], "--against", str(out)])
    evaluate.main()
    assert "+0.0 points" in capsys.readouterr().out
    summary = json.loads((out / "summary.json").read_text())
    assert summary["steered"]["against"]["p"] == 1.0


def test_the_table_of_robustness(loaded, steered, steering_file, tmp_path):
    config = RobustnessConfig(
        (str(steering_file),), perturb=("casing",), examples=6, batch_size=4, out=str(tmp_path), split="test"
    )
    task = replace(TASK, test=json.loads(json.dumps(str(steering_file.parent / "data.jsonl"))))
    Path(task.test).write_text(
        "".join(json.dumps({"prompt": e.turns[0].text, "completion": e.answer}) + "\n" for e in letters(8))
    )
    sets = example_sets(config, task, task)
    assert list(sets) == ["as trained", "casing", "transferred"]
    methods = {name: (file.plan, file.steering) for name, file in read_methods(config).items()}
    assert list(methods) == ["one"]
    lines = measure(config, evaluator_of(loaded), {"base": ((), {}), **methods}, sets)
    head, base, one = table_of(lines)
    assert head[1:3] == ["as trained, n = 6", "casing, n = 6"]
    assert base[0] == "base"
    assert base[-1] == "0 (0 to 0)"
    assert lines[1].divergence.low > 0
    assert one[1] != one[2] or lines[1].answers["as trained"] != lines[1].answers["casing"]
    assert summarise(lines[1].answers["transferred"]) == summarise(lines[1].answers["as trained"])
    with pytest.raises(ValueError, match="at least 2 texts"):
        divergences(evaluator_of(loaded, steered[0]), Params(None, steered[1]), ["one text only"])
    with pytest.raises(ValueError, match="different name"):
        read_methods(replace(config, names=("base",)))


def test_robustness_asks_on_the_day_that_each_method_was_trained_for(loaded, monkeypatch, tmp_path):
    asked = []
    monkeypatch.setattr("train.robustness.divergences", lambda *_: [0.0, 0.0])
    monkeypatch.setattr(Evaluator, "answer", lambda self, *_, **__: asked.append(self.encoding.date))
    methods = {"base": ((), {}), "one": ((), {})}
    config = RobustnessConfig(("x",), out=str(tmp_path))
    measure(config, evaluator_of(loaded), methods, {"as trained": (TASK, [])}, {"one": "2001-02-03"})
    assert asked == [None, "2001-02-03"]


def test_an_empty_choice_has_no_characters_to_divide_by():
    tokens = SimpleNamespace(source="choices.jsonl:3", answer="b", ids=np.zeros(1, np.int32))
    prompts = Prompts(("a",), (tokens,), (), "exact", 1, (("", "b"),))
    with pytest.raises(ValueError, match=r"choices\.jsonl:3: an empty choice .* --normalise tokens"):
        chosen_reader(prompts, "characters")
    scores = [Likelihood(-3.0, False, 1), Likelihood(-1.0, False, 2)]
    assert chosen_reader(prompts, "tokens")(0, scores).output == "b"
