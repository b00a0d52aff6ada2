"""`train.contrast` from the outside: pairs in, a steering file out, figures against forward passes, and refusals."""

import importlib
import json
import shutil
import sys
from contextlib import nullcontext

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsteer import FixedVector, Model, Positions, forward
from jaxsteer.batches import make_batch, stack_rows
from jaxsteer.contrast import contrast_directions, read_stream
from jaxsteer.io import load_model, load_steering
from jaxsteer.models.transformer import logits_of, output_embedding
from jaxsteer.theory.compare import kl_from_base
from train.cli import run_main
from train.contrast import sweep
from train.contrast.answers import repetition
from train.contrast.kept import KeptCells
from train.contrast.pairs import divide, encode_pairs, read_pair
from train.contrast.settings import ContrastConfig
from train.data import Encoding
from train.data.preference_rows import PreferenceReading
from train.evaluation.statistics import Estimate

# Each side repeats a letter: a random model with a tied head says the letter more that its stream is moved towards.
PAIRS = [{"prompt": f"{word}?", "chosen": "aaaa", "rejected": "zzz"} for word in "bcdefghijk"]
NEUTRAL = "the river rises\nbread needs water\n"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("contrast")
    write(folder / "pairs.jsonl", PAIRS[:6])
    write(folder / "held.jsonl", PAIRS[6:])
    (folder / "neutral.txt").write_text(NEUTRAL)
    (folder / "scorer.py").write_text(
        "def letters(prompt, answer):\n    return len(prompt) + sum(map(ord, answer)) % 97\n\n"
        "def nothing(prompt, answer):\n    return float('nan')\n\n"
        "def breaks(prompt, answer):\n    return answer.undefined\n"
    )
    return folder


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def run(arguments, fails=False):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["contrast", *map(str, arguments)])
        with pytest.raises(SystemExit) if fails else nullcontext() as exit:
            run_main(importlib.import_module("train.contrast.__main__").main)
    assert not fails or exit.value.code == 1


@pytest.fixture(scope="module")
def options(folder, tiny_folder):
    sizes = ("--max-new-tokens", 4, "--answers", 2, "--batch-size", 4, "--max-kl", 50, "--layers", 0, 1, "--strengths")
    return ("--model", tiny_folder, "--neutral", folder / "neutral.txt", *sizes, 0.5, 20)


@pytest.fixture(scope="module")
def made(folder, options):
    """The folder of a run."""
    run([folder / "pairs.jsonl", "--validation", folder / "held.jsonl", "--out", folder / "out", *options])
    return folder / "out"


@pytest.fixture(scope="module")
def figures(made):
    return json.loads((made / "contrast.json").read_text())


@pytest.fixture(scope="module")
def loaded(tiny_folder):
    return load_model(tiny_folder)


def sides(loaded, rows):
    pairs = [read_pair(row, f"row {i}", PreferenceReading()) for i, row in enumerate(rows)]
    return encode_pairs(pairs, loaded.require_tokenizer(), Encoding(), loaded.config)


def test_the_file_holds_the_chosen_layer_with_its_strength(made, figures, loaded):
    file = load_steering(made / "steering.safetensors")
    (slot,) = file.plan
    chosen = figures["chosen"]
    assert (slot.method, slot.sites, slot.layers) == (FixedVector(), ("block",), (chosen["layer"],))
    means = []
    for side in sides(loaded, PAIRS[:6]):
        batch = stack_rows([[text] for text in side], 16)
        means.append(read_stream(Model(loaded.config), loaded.base, jax.tree.map(jnp.asarray, batch), 1)[:, :, 0])
    vectors = contrast_directions(*means).vectors
    expected = chosen["strength"] * vectors[chosen["layer"]]
    np.testing.assert_allclose(file.steering["contrast"]["block"]["v"][0], expected, rtol=1e-3, atol=1e-5)


def test_figures_are_those_of_the_saved_steering(made, figures, loaded):
    file = load_steering(made / "steering.safetensors")
    model = Model(loaded.config, file.plan)

    texts = [text for side in sides(loaded, PAIRS[6:]) for text in side]
    batch = jax.tree.map(jnp.asarray, stack_rows([[text] for text in texts], 16))

    @jax.jit
    def log_probabilities(steering):
        plan = file.plan if steering else ()
        hidden = forward(Model(loaded.config, plan), loaded.base, steering, batch).hidden
        return jax.nn.log_softmax(logits_of(hidden, output_embedding(loaded.base)))

    def gap(steering):
        logp = np.asarray(log_probabilities(steering))
        means = [
            np.mean([logp[i, t - 1, text.ids[t]] for t in np.flatnonzero(text.weights)]) for i, text in enumerate(texts)
        ]
        return np.mean(means[:4]) - np.mean(means[4:])

    shift = gap(file.steering) - gap({})
    np.testing.assert_allclose(figures["chosen"]["log_probability_difference"]["mean"], shift, rtol=1e-3, atol=1e-5)
    kls = []
    for line in NEUTRAL.splitlines():
        ids = np.array(loaded.require_tokenizer()(line)["input_ids"])
        batch = make_batch(ids[None], completion=np.arange(len(ids))[None] >= len(ids) // 2)
        kls.append(float(kl_from_base(model, loaded.base, file.steering, batch)[0]))
    np.testing.assert_allclose(figures["chosen"]["kl"]["mean"], np.mean(kls), rtol=1e-3)


def test_the_strongest_effect_is_chosen(figures):
    means = [cell["log_probability_difference"]["mean"] for cell in figures["cells"]]
    assert len(means) == 4
    assert figures["chosen"]["log_probability_difference"]["mean"] == max(means) > 0


def test_what_is_shown_and_noted(made, figures):
    assert {path.name for path in made.iterdir()} == {
        *("steering.safetensors", "contrast.json", "contrast.png", "tokens_1.png", "tokens_2.png", "sweep.jsonl")
    }
    assert len(figures["chosen"]["answers"]) == 2
    notes = load_steering(made / "steering.safetensors").notes
    (step,) = notes["provenance"]
    assert (step["by"], step["chosen"]["layer"]) == ("contrast", figures["chosen"]["layer"])
    assert set(step["data"]) == {"pairs", "validation", "neutral"}


def test_the_file_is_a_start_for_training(made, tiny_data, tiny_folder, tmp_path, monkeypatch, capsys):
    data = ["--task.train", tiny_data, "--model", tiny_folder, "--batch-size", 4, "--out", tmp_path / "run"]
    monkeypatch.setattr(sys, "argv", ["sft", "jsonl", "--start-from", str(made), "--dry-run", *map(str, data)])
    run_main(importlib.import_module("train.sft").main)
    assert "contrast" in capsys.readouterr().out


def test_what_was_measured_is_not_measured_again(made, folder, options, tmp_path, monkeypatch):
    """After an interruption, and with another budget; other settings begin anew."""
    shutil.copytree(made, tmp_path / "out")
    command = [folder / "pairs.jsonl", "--validation", folder / "held.jsonl", "--out", tmp_path / "out", *options]
    lines = (made / "sweep.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "out" / "sweep.jsonl").write_text("".join(lines[:3]) + lines[3][:20])
    done = []
    measure = sweep.Sweep.measure
    monkeypatch.setattr(sweep.Sweep, "measure", lambda self, *cell: done.append(cell) or measure(self, *cell))
    run(command)
    assert done == [(1, 0.5), (1, 20.0)]
    assert (
        json.loads((tmp_path / "out" / "contrast.json").read_text())["cells"]
        == json.loads((made / "contrast.json").read_text())["cells"]
    )
    monkeypatch.setattr(sweep.Sweep, "with_answers", lambda self, cells: pytest.fail("answered again"))
    run([*command, "--max-kl", 40])
    assert len(done) == 2
    KeptCells(tmp_path / "out" / "sweep.jsonl", "of other settings")
    assert (tmp_path / "out" / "sweep.jsonl").read_text() == '{"of": "of other settings"}\n'


def cell(layer, strength, kl, effect):
    exactly = lambda value: Estimate(value, value, value)
    return sweep.Cell(layer, strength, exactly(kl), exactly(effect))


def test_the_strongest_affordable_effect_is_the_best():
    before, nan = cell(-1, 0, 0, 0), float("nan")
    cells = [cell(0, 1, 0.1, 0.5), cell(0, 2, 0.4, 2.0), cell(1, 1, 0.2, 0.7), cell(1, 9, nan, nan)]
    assert sweep.best(sweep.affordable(cells, 0.2), before) == cells[2]
    assert sweep.best(sweep.affordable(cells, 1.0), before) == cells[1]
    with pytest.raises(ValueError, match=r"the least is 0\.1 nats per token, with strength 1 at layer 0"):
        sweep.affordable(cells, 0.05)
    with pytest.raises(ValueError, match="not finite; give smaller ones"):
        sweep.affordable(cells[3:], 1.0)
    with pytest.raises(ValueError, match=r"the largest is \-0.3, with strength 1 at layer 0"):
        sweep.best([cell(0, 1, 0.1, -0.3)], before)


def test_every_layer_and_strength_is_one_program(loaded):
    measured = sweep.Sweep(
        network=sweep.Network(Model(loaded.config), loaded.base, {}),
        directions=sweep.Directions(jnp.ones((3, 32)), jnp.zeros((3, 32))),
        positions=Positions(),
        sides=sides(loaded, PAIRS[:2]),
        neutral=[sides(loaded, PAIRS[:2]).positive[0]] * 2,
        answering=None,
        batch_size=2,
    )
    measured.measure(0, 0.5)
    before = sweep._kl._cache_size()
    assert measured.measure(2, 1.5).kl.mean != measured.measure(1, 0.1).kl.mean
    assert sweep._kl._cache_size() == before


def test_a_scorer_decides(folder, options, tmp_path):
    scored = ["--scorer", f"{folder / 'scorer.py'}:letters", "--out", tmp_path / "out"]
    run([folder / "pairs.jsonl", "--text", "abc", *options, *scored])
    found = json.loads((tmp_path / "out" / "contrast.json").read_text())
    score = lambda cell: cell["score"]["mean"]
    assert score(found["chosen"]) == max(map(score, found["cells"])) > score(found["untouched"])
    letters = [2 + sum(map(ord, answer)) % 97 for answer in found["chosen"]["answers"]]
    assert score(found["chosen"]) == pytest.approx(np.mean(letters))


SAME = [{"positive": "a", "negative": "a"}, PAIRS[0]]


@pytest.mark.parametrize(
    ("rows", "arguments", "message"),
    [
        (SAME, (), "bad.jsonl:1: 'positive' and 'negative' are the same"),
        ([PAIRS[0], PAIRS[1] | {"rejected": "aaaa"}], (), "bad.jsonl:2: 'chosen' and 'rejected' are the same answer"),
        (PAIRS[:1], (), "has 1 pair, need at least 2"),
        ([{"text": "a"}] * 2, (), "bad.jsonl:1: no pair, got the keys ['text']"),
        ([{"positive": "a"}] * 2, (), "bad.jsonl:1: no key 'negative'"),
        ([{"prompt": "a", "completion": "b", "label": True}] * 2, (), "an answer with a label has one side only"),
        ([{"positive": [{"role": "user", "content": "a"}], "negative": "b"}] * 2, (), "give --chat"),
        ([{"positive": "a", "negative": "b"}] * 2, (), "one token only"),
        (PAIRS, ("--layers", 3), "--layers 3: the model's layers are 0 to 2"),
        (PAIRS, ("--layers", 1, 1), "named twice"),
        (PAIRS, ("--strengths", -1), "exchange the sides"),
        (PAIRS, ("--max-kl", 1e-9), "every strength moves the model further"),
        (PAIRS, ("--max-kl", 0), "--max-kl must be above 0"),
        (PAIRS, ("--answers", 1), "--answers must be at least 2"),
        (PAIRS, ("--template", "x"), "must contain {prompt}"),
        (PAIRS, ("--scorer", "letters"), "need FILE.py:FUNCTION"),
        (PAIRS, ("--scorer", "none.py:letters"), "no such file none.py"),
        (PAIRS, ("--scorer", "SCORER:none"), "has no function 'none'"),
        (PAIRS, ("--scorer", "SCORER:nothing"), "gave nan, need a finite number"),
        (PAIRS, ("--scorer", "SCORER:breaks"), "AttributeError"),
        ([{"positive": "ab", "negative": "ba"}] * 4, ("--scorer", "SCORER:letters"), "give more with --prompts"),
    ],
)
def test_bad_input_is_refused(folder, options, tmp_path, capsys, rows, arguments, message):
    write(tmp_path / "bad.jsonl", rows)
    arguments = [str(word).replace("SCORER", str(folder / "scorer.py")) for word in arguments]
    run([tmp_path / "bad.jsonl", "--out", tmp_path / "out", *options, *arguments], fails=True)
    assert "".join(message.split()) in "".join(capsys.readouterr().err.split())  # long paths are broken anywhere
    assert not (tmp_path / "out" / "steering.safetensors").exists()


def test_pairs_that_both_make_and_decide_are_told(folder, options, tmp_path, capsys):
    """The budget ends the run after the note."""
    limits = [*options, "--max-kl", 1e-9]
    run([folder / "held.jsonl", "--validation", folder / "held.jsonl", "--out", tmp_path, *limits], fails=True)
    assert "4 of 4 pairs are in" in " ".join(capsys.readouterr().err.split())
    write(tmp_path / "few.jsonl", PAIRS[:3])
    run([tmp_path / "few.jsonl", "--out", tmp_path / "out", *limits], fails=True)
    assert "3 pairs are too few to hold any out" in " ".join(capsys.readouterr().err.split())


def test_a_folder_with_something_else_is_not_written_to(folder, options, tmp_path, capsys):
    (tmp_path / "mine.txt").write_text("mine")
    run([folder / "pairs.jsonl", "--out", tmp_path, *options], fails=True)
    assert "neither empty nor of an earlier jaxsteer contrast" in " ".join(capsys.readouterr().err.split())


USER, ANSWER = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes"}


def test_rows_of_every_kind(loaded):
    chat = PreferenceReading(chat=True)
    other = [USER, ANSWER | {"content": "No"}]
    rows = [
        {"positive": [USER, ANSWER], "negative": other},
        {"prompt": "Hi", "positive": "Yes", "negative": "No"},
        {"prompt": "Hi", "chosen": "Yes", "rejected": "No"},
        {"chosen": [USER, ANSWER], "rejected": other},
    ]
    pairs = [read_pair(row, "here", chat) for row in rows]
    assert len({(pair.positive.turns, pair.negative.turns) for pair in pairs}) == 1
    assert all(pair.question.turns == (("user", "Hi"),) for pair in pairs)
    encoded = encode_pairs(pairs, loaded.require_tokenizer(), Encoding(chat=True), loaded.config)
    counted = [text.ids[text.weights != 0] for text in encoded.positive]
    assert [loaded.require_tokenizer().decode(ids) for ids in counted] == ["Yes"] * 4


def test_prompts_count_from_where_they_differ(loaded):
    pair = read_pair({"positive": "I am glad", "negative": "I am sad"}, "here", PreferenceReading())
    assert pair.question is None
    encoded = encode_pairs([pair], loaded.require_tokenizer(), Encoding(), loaded.config)
    decode = lambda text: loaded.require_tokenizer().decode(text.ids[text.completion])
    assert [decode(side[0]) for side in encoded] == ["glad", "sad"]


def test_pairs_are_divided_without_overlap():
    train, validation = divide(20, 0.25, seed=0)
    assert sorted([*train, *validation]) == list(range(20))
    assert len(validation) == 5
    assert [len(part) for part in divide(3, 0.25, seed=0)] == [3, 3]
    assert [len(part) for part in divide(4, 0.01, seed=0)] == [2, 2]


def test_layers_are_spread_over_the_middle():
    config = ContrastConfig("x")
    assert config.layers_to_try(30)[0] == 6
    assert config.layers_to_try(30)[-1] == 23
    assert config.layers_to_try(1) == (0,)
    assert config.layers_to_try(2) == (0, 1)


def test_repetition_counts_runs_that_come_again():
    assert repetition([np.array([1, 2, 3, 1, 2, 3])]) == 1 / 4
    assert repetition([np.array([1, 2]), np.array([], int)]) == 0
