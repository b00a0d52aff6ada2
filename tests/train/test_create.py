"""New models with random weights: what is written, and what is refused."""

import sys

import numpy as np
import pytest

from jaxsteer import Model, forward, make_batch
from jaxsteer.io import load_model
from train.cli import run_main
from train.create import CreateConfig, main

SIZES = ("--layers", "2", "--width", "32", "--heads", "4", "--kv-heads", "2", "--max-length", "64")


def create(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["create", *map(str, words)])
    run_main(main)


def test_a_model_is_written_that_loads(tmp_path, monkeypatch, capsys):
    create(monkeypatch, tmp_path / "new", *SIZES)
    loaded = load_model(tmp_path / "new")
    assert (loaded.config.layers, loaded.config.mlp_width, loaded.config.vocab_size) == (2, 96, 259)
    assert loaded.config.kv_heads == 2
    tokenizer = loaded.require_tokenizer()
    text = "naïve: 1 + 1\n"
    ids = np.array(tokenizer(text)["input_ids"])
    assert len(ids) == len(text.encode())
    assert tokenizer.decode(ids) == text
    assert loaded.stop_tokens == (0,)
    assert (
        tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True)
        == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )
    assert np.isfinite(forward(Model(loaded.config), loaded.base, {}, make_batch(ids[None])).hidden).all()
    assert "parameters" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        create(monkeypatch, tmp_path / "new", *SIZES)
    assert "there is something already" in " ".join(capsys.readouterr().err.split())


def test_the_seed_decides(tmp_path, monkeypatch):
    for seed in (0, 1):
        create(monkeypatch, tmp_path / str(seed), "--width", 16, "--heads", 2, "--layers", 1, "--seed", seed)
    first, other = (load_model(tmp_path / str(seed)).base["embed"]["embedding"] for seed in (0, 1))
    assert not np.array_equal(first, other)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"layers": 0}, "--layers must be at least 1"),
        ({"width": 36}, "--width 36: must be a multiple of 8"),
        ({"kv_heads": 3}, "--kv-heads 3: must divide --heads 4"),
        ({"mlp_width": 0}, "--mlp-width must be at least 1"),
    ],
)
def test_sizes_that_no_model_has(settings, said):
    with pytest.raises(ValueError, match=said):
        CreateConfig("new", **settings).check()
