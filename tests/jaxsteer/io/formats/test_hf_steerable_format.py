"""Steerable bases: zero places that change nothing, and which plans fit into them."""

import json

import numpy as np
import pytest
from exported import family_model, logits, read_again, refusals, steered_of, written
from tiny import identical

from jaxsteer.io import SteeredModel, load_model
from jaxsteer.io.files import read_json
from jaxsteer.io.formats import FORMATS
from jaxsteer.io.formats.hf_steerable import RANKS
from jaxsteer.io.safetensors_file import open_safetensors

HF_STEERABLE = FORMATS["hf-steerable"]
TOKENS = np.arange(3, 13)[None]


def export(golden, folder, *texts, family="llama", **options):
    whole = steered_of(family_model(golden, family), *texts)
    return whole, written(HF_STEERABLE, whole, folder, **options)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_places_are_zero_and_change_nothing(golden, tmp_path, family):
    whole, reduced = export(
        golden, tmp_path, "lora @ attn.q", "nonlinear(rank=3, activation=tanh) @ block", family=family
    )
    assert HF_STEERABLE.recognises(tmp_path)
    read = read_again(HF_STEERABLE, tmp_path)
    (slot,) = read.plan
    assert (slot.method.rank, slot.method.activation, slot.method.alpha) == (8, "tanh", 1.0)
    identical(read.steering, reduced.steering)
    identical(read.base, whole.base)
    np.testing.assert_array_equal(logits(read, TOKENS), logits(SteeredModel(whole.loaded), TOKENS))
    tensors = open_safetensors(tmp_path / "model-00002-of-00002.safetensors")[0]
    blocks, width = {"llama": "model.layers", "gpt2": "transformer.h"}[family], whole.loaded.config.width
    assert tensors[f"{blocks}.1.steer_down.weight"].shape == (8, width)
    assert tensors[f"{blocks}.1.steer_up.weight"].shape == (width, 8)
    assert len(tensors) == 2 * whole.loaded.config.layers
    with pytest.raises(ValueError, match=r"jaxsteer\.load"):
        load_model(tmp_path)


@pytest.mark.parametrize(
    ("rank", "asked", "expected"), [(1, None, 1), (2, None, 8), (9, None, 16), (33, None, 48), (2, 12, 12)]
)
def test_the_rank_is_one_that_vllm_serves(golden, tmp_path, rank, asked, expected):
    _, reduced = export(golden, tmp_path, f"nonlinear(rank={rank}) @ block", rank=asked)
    assert reduced.plan[0].method.rank == expected
    assert expected in (*RANKS, 12, reduced.loaded.config.width)


def test_the_places_have_the_dtype_of_the_base(golden, tmp_path):
    export(golden, tmp_path, "nonlinear @ block", dtype="bfloat16")
    tensors = open_safetensors(tmp_path / "model-00002-of-00002.safetensors")[0]
    assert {tensor.form for tensor in tensors.values()} == {"BF16"}


def test_the_first_shard_is_the_plain_model(golden, tmp_path):
    whole, _ = export(golden, tmp_path, "nonlinear @ block")
    ours = open_safetensors(tmp_path / "model-00001-of-00002.safetensors")[0]
    theirs = open_safetensors(golden / "tiny_llama" / "model.safetensors")[0]
    assert set(ours) == set(theirs)
    index = read_json(tmp_path / "model.safetensors.index.json")
    assert len(index["weight_map"]) == len(ours) + 2 * whole.loaded.config.layers


def test_refusals(golden):
    llama = family_model(golden, "llama")
    one = lambda *texts, **options: refusals(HF_STEERABLE, llama, *texts, **options)
    assert not one("nonlinear @ block layers=0", "nonlinear(rank=4) @ block layers=1 name=b", "lora @ attn.q")
    cases = {
        ("nonlinear @ block", "nonlinear @ block name=b"): ("slot 'b'", "hf-steered"),
        ("nonlinear @ block layers=0", "nonlinear(activation=relu) @ block layers=1 name=b"): ("silu", "hf-steered"),
        ("nonlinear @ block positions=last",): ("positions last", "Use jaxsteer itself"),
        ("nonlinear @ block layers=0", "fixed @ block name=v"): ("slot 'v' (fixed @ block)", "hf-steered"),
        ("nonlinear @ block layers=0", "linear @ block name=l"): ("slot 'l' (linear @ block)", "hf-steered"),
        ("nonlinear @ block", "nonlinear @ attn name=n"): ("slot 'n' (nonlinear @ attn)", "jaxsteer itself"),
        ("nonlinear @ block", "dora @ attn.q"): ("slot 'dora'", "merge"),
        ("lora @ attn.q",): ("no linear or nonlinear steering @ block", "--to peft"),
    }
    for texts, words in cases.items():
        (reason,) = one(*texts)
        assert all(word in reason for word in words), (texts, reason)
    for rank in (4, 49):
        (reason,) = one("nonlinear(rank=8) @ block", rank=rank)
        assert reason.startswith(f"--rank {rank}: the plan needs 8, and at most 48 can be served")


@pytest.mark.parametrize(
    ("key", "value"), [("rank", 0), ("rank", True), ("rank", 10**12), ("rank", 16), ("activation", [])]
)
def test_damaged_descriptions_are_refused(golden, tmp_path, key, value):
    export(golden, tmp_path, "nonlinear(rank=3) @ block")
    config = read_json(tmp_path / "config.json")
    config["jaxsteer"][key] = value
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=str(tmp_path)):
        read_again(HF_STEERABLE, tmp_path)


def test_two_slots_of_other_blocks_share_the_base(golden, tmp_path):
    texts = ("nonlinear(rank=2) @ block layers=0", "nonlinear(rank=9) @ block layers=1,2 name=b")
    _, reduced = export(golden, tmp_path, *texts)
    assert reduced.plan[0].method.rank == 16
    assert reduced.plan[0].layers is None
