"""`train.generate` and `train.inspect` from the outside: prompts in, answers out, and what they refuse."""

import importlib
import io
import json
import sys
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from tiny_model import TINY

from jaxsteer import LinearSteering, LoRA, Model, Params, Slot, init_steering
from jaxsteer.io import save_steering
from train.cli import run_main
from train.data.prompts import divide
from train.display.heatmap import render_heatmap
from train.evaluation.answers import Prompts
from train.evaluation.journal import FileJournal
from train.evaluation.replies import TextStream, pieces_of
from train.evaluation.strength import parse_strength

PLAN = (Slot("lora", LoRA(rank=2), ("attn.q",)), Slot("post_block", LinearSteering(rank=2), ("block",)))


@pytest.fixture(scope="module")
def make_file(tiny_folder, tmp_path_factory):
    """Writes a steering file with some notes and parameters `scale` times a fixed draw."""

    def make(scale=2.0, **notes):
        path = tmp_path_factory.mktemp("steering") / "steering.safetensors"
        draw = np.random.default_rng(0)
        zeros = init_steering(PLAN, TINY, jax.random.key(0))
        steering = jax.tree.map(lambda leaf: np.float32(scale * draw.standard_normal(leaf.shape)), zeros)
        save_steering(path, steering, PLAN, model_name=str(tiny_folder), config=TINY, notes=notes)
        return str(path)

    return make


@pytest.fixture(scope="module")
def steering(make_file):
    return make_file(template="{prompt}>", max_new_tokens=6)


@pytest.fixture
def run(monkeypatch, capsys):
    """Runs a command as its own process would; gives what it prints, and what it reports if it fails."""

    def call(module, *arguments, stdin=b"", fails=False):
        monkeypatch.setattr(sys, "argv", [module, *map(str, arguments)])
        monkeypatch.setattr(sys, "stdin", None if stdin is None else SimpleNamespace(buffer=io.BytesIO(stdin)))
        capsys.readouterr()
        with pytest.raises(SystemExit) if fails else nullcontext() as exit:
            run_main(importlib.import_module(module).main)
        printed = capsys.readouterr()
        assert not fails or exit.value.code == 1
        return " ".join(printed.err.partition("error:")[2].split()) if fails else printed.out

    return call


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


# ---- prompts in, answers out


def test_a_file_of_rows_becomes_a_file_of_answers(run, steering, tmp_path):
    """A single prompt streams the same answer."""
    rows = [{"prompt": "ab\ncd", "id": 7}, {"prompt": "x", "output": "mine"}, {"prompt": "ab\ncd", "completion": "no"}]
    given, out = tmp_path / "prompts.jsonl", tmp_path / "made" / "answers.jsonl"
    given.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert "3 answers" in run("train.generate", steering, "--input", given, "--output", out)
    answers = lines(out)
    assert [answer["row"] for answer in answers] == rows
    assert [answer["prompt"] for answer in answers] == ["ab\ncd", "x", "ab\ncd"]
    assert {answer["finished"] for answer in answers} <= {"stop", "length"}
    assert all(answer["tokens"] == 6 for answer in answers if answer["finished"] == "length")
    assert answers[0]["output"] == answers[2]["output"]
    assert run("train.generate", steering, "ab\ncd") == answers[0]["output"] + "\n"
    assert not out.with_name("answers.jsonl.unfinished").exists()


def test_a_killed_generation_keeps_what_is_finished(run, steering, tmp_path, monkeypatch):
    given, out = tmp_path / "prompts.txt", tmp_path / "answers.jsonl"
    given.write_text("ab\n\ncd\nef\n")
    add, asked = FileJournal.add, []

    def dying(journal, index, answer):
        if len(asked) == 2:
            raise KeyboardInterrupt
        asked.append(index)
        add(journal, index, answer)

    monkeypatch.setattr(FileJournal, "add", dying)
    arguments = ("train.generate", steering, "--input", given, "--output", out)
    with pytest.raises(AssertionError):  # exit status 130
        run(*arguments, fails=True)
    assert len(lines(out.with_name("answers.jsonl.unfinished"))) == 3
    monkeypatch.setattr(FileJournal, "add", lambda journal, i, answer: (asked.append(i), add(journal, i, answer)))
    assert "another strength" in run(*arguments, "--strength", "0.5", fails=True)
    run(*arguments)
    assert sorted(asked) == [0, 1, 2]
    assert [answer["prompt"] for answer in lines(out)] == ["ab", "cd", "ef"]


@pytest.mark.slow
def test_conversations_and_system_messages(run, steering, tmp_path):
    talk = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]
    own = [{"role": "system", "content": "own"}, {"role": "user", "content": "d"}]
    given, out = tmp_path / "talks.jsonl", tmp_path / "answers.jsonl"
    given.write_text("".join(json.dumps({"messages": each}) + "\n" for each in (talk, own)))
    run("train.generate", steering, "--input", given, "--output", out, "--system", "be brief")
    first, second = (answer["prompt"] for answer in lines(out))
    assert first.startswith("<|im_start|>system\nbe brief<|im_end|>\n<|im_start|>user\na<|im_end|>")
    assert first.endswith("<|im_start|>user\nc<|im_end|>\n<|im_start|>assistant\n")
    assert second.startswith("<|im_start|>system\nown<|im_end|>\n<|im_start|>user\nd")


@pytest.mark.parametrize(
    ("division", "want"),
    [
        ("lines", [(1, "a"), (2, " b"), (4, "c")]),
        ("paragraphs", [(1, "a\n b"), (4, "c")]),
        ("whole", [(1, "a\n b\n\nc")]),
    ],
)
def test_a_text_is_divided_into_prompts(division, want):
    assert divide("a\r\n b\n\nc\n", division) == want
    assert divide(" \n\n", division) == []


@pytest.mark.parametrize(
    ("arguments", "stdin", "message"),
    [
        ((), None, "standard input (which is closed)"),
        ((), b"", "no prompts"),
        ((), b"ab\n\xff\n", "standard input: not UTF-8 text (invalid start byte at byte 3)"),
        (("ab", ""), b"", "prompt 2: the prompt is empty"),
        (("a\udcff",), b"", "prompt 1: not valid Unicode"),
        (("a", "--max-new-tokens", "0"), b"", "--max-new-tokens must be at least 1, got 0"),
        (("a", "--max-new-tokens", "100000000"), b"", "max_new_tokens=100,000,000: this model's context has 64 tokens"),
        (("a", "--system", "be brief"), b"", "--system needs a chat template; add --chat True"),
        (("a", "--strength", "post_blok=2"), b"", "did you mean post_block?"),
        (("a", "--strength", "b"), b"", "neither a number nor SLOT=NUMBER"),
        (("a", "--strength", "nan"), b"", "must be a finite number"),
        (("--input", "missing.jsonl"), b"", "missing.jsonl: no such file"),
        (("a", "--output", "answers.txt"), b"", "must be the name of a .jsonl file"),
        (("a", "--output", "answers.jsonl", "--compare"), b"", "leave out --compare"),
    ],
)
def test_what_is_refused_before_the_model_is_loaded(arguments, stdin, message, run, steering, monkeypatch):
    monkeypatch.setattr("train.base_models.load_model", None)
    assert message in run("train.generate", steering, *arguments, stdin=stdin, fails=True)


def test_answers_longer_than_the_context_are_refused_without_a_steering_file(run, tiny_folder):
    arguments = ("train.generate", "none", "a", "--model", tiny_folder, "--max-new-tokens", "100000000")
    assert "this model's context has 64 tokens" in run(*arguments, fails=True)


# ---- strength


@pytest.mark.slow
def test_strength_on_the_command_line(run, steering, tiny_folder):
    ask = lambda file, *more: run("train.generate", file, *more).splitlines()[1::2]
    steered = lambda *more: ask(steering, "ab", "cd", "ef", *more)
    whole = steered()
    assert steered("--strength", "0", "lora=1", "post_block=1") == whole != steered("--strength", "post_block=-3")
    unsteered = ask("none", "ab>", "cd>", "ef>", "--model", tiny_folder, "--max-new-tokens", "6")
    assert steered("--strength", "0") == unsteered != whole


@pytest.mark.slow
def test_strength_is_part_of_an_evaluation(run, steering, tiny_data, tmp_path):
    evaluate = lambda *more: run(
        "train.evaluate", steering, "--data", tiny_data, "--examples", "4", "--out", tmp_path, "--no-base", *more
    )
    read = lambda name: json.loads((tmp_path / name).read_text())
    assert "strength post_block 0.5" in evaluate("--strength", "post_block=0.5")
    assert read("summary.json")["strength"] == {"post_block": 0.5}
    assert read("steered.identity.json")["strength"] == {"post_block": 0.5}
    halved = (tmp_path / "steered.jsonl").read_text()
    evaluate("--strength", "0.5", "lora=1", "post_block=1")
    assert read("summary.json")["strength"] is None
    assert "strength" not in read("steered.identity.json")
    assert (tmp_path / "steered.jsonl").read_text() != halved


def test_strength_is_read():
    assert parse_strength((), PLAN) is None
    assert parse_strength(("1",), PLAN) is None
    assert parse_strength(("-0.5",), PLAN) == {"lora": -0.5, "post_block": -0.5}
    assert parse_strength(("2", "lora=0"), PLAN) == {"lora": 0.0, "post_block": 2.0}
    with pytest.raises(ValueError, match="is given twice"):
        parse_strength(("lora=1", "lora=2"), PLAN)
    with pytest.raises(ValueError, match="nothing is steered"):
        parse_strength(("0.5",), ())


def test_strength_identifies_an_evaluation():
    """Answers at another strength are not taken over; without one, the identity is as it always was."""
    from train.evaluation.evaluator import Evaluator

    loaded = SimpleNamespace(name="m", fingerprint="f", base={"x": np.zeros(1)})
    evaluator = Evaluator(Model(TINY), loaded, task=None, placement=None)
    prompts = Prompts((), (), (), "exact", 1)
    identity = lambda strength: replace(evaluator, strength=strength).identity(prompts, Params(None, {}))
    assert "strength" not in identity(None)
    assert identity({"lora": 0.5}) == identity(None) | {"strength": {"lora": 0.5}}


# ---- logits that are not finite


def test_nonfinite_logits_are_reported_and_not_answered(run, make_file, tmp_path):
    broken = make_file(float("nan"), max_new_tokens=6)
    message = run("train.generate", broken, "ab", fails=True)
    assert message.startswith("prompt 1: the model gave non-finite logits")
    assert "token ids" in message
    assert "and for 2 of the other prompts" in run("train.generate", broken, "ab", "cd", "ef", fails=True)
    out = tmp_path / "answers.jsonl"
    run("train.generate", broken, "ab", "--output", out, fails=True)
    assert [(answer["finished"], answer["output"]) for answer in lines(out)] == [("nonfinite", "")]


@pytest.mark.slow
def test_nonfinite_logits_end_an_evaluation(run, make_file, tiny_data, tmp_path):
    broken = make_file(float("nan"))
    arguments = ("train.evaluate", broken, "--data", tiny_data, "--examples", "2", "--out", tmp_path, "--no-base")
    assert "non-finite logits" in run(*arguments, fails=True)
    assert "non-finite logits" in run("train.inspect", broken, "--prompt", "ab$é", "--per-token", fails=True)


# ---- text as it comes


@pytest.mark.parametrize("text", ["héllo wörld 日本 🙂 don't stop", " a  b\n", ""])
def test_streamed_text_is_the_decoded_text(text, tiny_folder):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_folder)
    ids = np.array(tokenizer(text)["input_ids"], np.int32)
    stream, pieces = TextStream(tokenizer.decode), []
    for end in range(1, len(ids) + 1):
        pieces.append(stream.update(ids[:end]))
        assert "\ufffd" not in pieces[-1]
    assert "".join(pieces) + stream.update(ids, final=True) == text
    assert "".join(pieces_of(ids, tokenizer.decode)) == text


# ---- inspect


def test_inspect_shows_each_token(run, steering, tmp_path):
    plot = tmp_path / "tokens.png"
    arguments = ("train.inspect", steering, "--prompt", "ab$é", "--per-token", "--plot", plot)
    shown = run(*arguments)
    assert "Δ log p" in shown
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert "largest 0.0000" not in shown


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--prompt", ""), "--prompt: the prompt is empty"),
        (("--per-token",), "need a --prompt"),
        (("--prompt", "a", "--plot", "no/such/folder.png"), "there is no folder"),
        (("--prompt", "a", "--plot", "tokens.svg"), "give a name that ends in .png"),
    ],
)
def test_what_inspect_refuses(arguments, message, run, steering):
    assert message in run("train.inspect", steering, *arguments, fails=True)


def test_a_heat_map_is_the_text_with_a_colour_for_each_piece(tmp_path):
    text = render_heatmap(["a", " b", "c"], np.array([0.0, 1.0, -1.0]), png=tmp_path / "map.png")
    assert text.plain == "a bc"
    assert [str(span.style).split(" on ")[1] for span in text.spans] == [
        "rgb(255,255,255)",
        "rgb(213,94,0)",
        "rgb(0,114,178)",
    ]
    with pytest.raises(ValueError, match="3 pieces"):
        render_heatmap(["a", "b", "c"], np.zeros((2, 2)))
    with pytest.raises(ValueError, match="finite"):
        render_heatmap(["a"], np.array([np.nan]))
