"""Adapters over a steerable base: what stands in the files, what comes back, and what is refused."""

import json
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tiny import identical, random_steering

from jaxsteer.io import load_model
from jaxsteer.io.formats import FORMATS, Given, WriteOptions
from jaxsteer.io.formats.convert import load, recognise
from jaxsteer.io.formats.vllm import max_lora_rank
from jaxsteer.io.steered import SteeredModel
from jaxsteer.models.families import FAMILIES
from jaxsteer.plans import parse_plan

VLLM = FORMATS["vllm"]
BLOCK = "nonlinear(rank=4, alpha=0.3) @ block layers=0,2 name=steer"
JOINT = (BLOCK, "lora(rank=2, alpha=3.0) @ attn.q,mlp.down", "pissa(rank=2) @ attn.k", "linear(rank=2) @ mlp.in")


def steered(loaded, *texts, seed=1):
    plan = parse_plan(texts, loaded.config)
    return SteeredModel(loaded, plan, random_steering(plan, loaded.config, seed))


def refused(model, over, **options):
    return "\n".join(
        VLLM.refuse(model.plan, FAMILIES[model.loaded.family], model.loaded.config, WriteOptions(over=over, **options))
    )


def written(model, to, folder, over=None):
    folder.mkdir()
    row, options = FORMATS[to], WriteOptions(over=over)
    reduced = row.reduce(model, options)
    row.write(reduced, folder, options)
    return reduced


@pytest.fixture(scope="module")
def loaded(golden):
    return load_model(golden / "tiny_llama")


@pytest.fixture(scope="module")
def over(loaded, tmp_path_factory):
    folder = tmp_path_factory.mktemp("over") / "base"
    written(steered(loaded, BLOCK), "hf-steerable", folder)  # has places of rank 8
    return folder


def test_factors_stand_in_the_file_as_they_are(loaded, over, tmp_path):
    model = steered(loaded, BLOCK)
    written(model, "vllm", tmp_path / "a", over)
    tensors, leaves = load_file(tmp_path / "a" / "adapter_model.safetensors"), model.steering["steer"]["block"]
    assert len(tensors) == 2 * 4
    for at, layer in enumerate((0, 2)):
        block = f"base_model.model.model.layers.{layer}"
        identical(tensors[f"{block}.steer_down.lora_A.weight"], np.asarray(leaves["D"][at]))
        identical(tensors[f"{block}.steer_up.lora_B.weight"], np.asarray(leaves["U"][at]))
        identical(tensors[f"{block}.steer_down.lora_B.weight"], np.eye(8, 4, dtype=np.float32))
        identical(tensors[f"{block}.steer_up.lora_A.weight"], np.eye(4, 8, dtype=np.float32))
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    alpha = {"steer_down": config["lora_alpha"], "steer_up": config["lora_alpha"]} | config["alpha_pattern"]
    assert (config["r"], config["rank_pattern"]) == (4, {})
    assert alpha == {"steer_down": 4, "steer_up": pytest.approx(1.2)}


@pytest.mark.parametrize("family", ["tiny_llama", "families/phi3", "families/gemma2"])
def test_what_is_written_comes_back(golden, tmp_path, family):
    loaded = load_model(golden / family)
    model = steered(loaded, *JOINT, "nonlinear(rank=2) @ block layers=1 name=other")
    written(model, "hf-steerable", tmp_path / "base")
    reduced = written(model, "vllm", tmp_path / "a", tmp_path / "base")
    assert recognise(tmp_path / "a").format.name == "vllm"
    back = VLLM.read(tmp_path / "a", loaded, Given())
    assert back.plan == reduced.plan
    identical(back.steering, reduced.steering)
    steering = [slot for slot in back.plan if slot.sites == ("block",)]
    assert [(slot.layers, slot.method.rank, slot.method.alpha) for slot in steering] == [
        ((0, 2), 4, pytest.approx(0.3)),
        ((1,), 2, 1.0),
    ]
    identical(back.steering["steering"]["block"], model.steering["steer"]["block"])


def test_linear_steering_over_a_base_without_activation(loaded, tmp_path):
    model = steered(loaded, "linear(rank=3, alpha=2.0) @ block")
    written(model, "hf-steerable", tmp_path / "base")
    written(model, "vllm", tmp_path / "a", tmp_path / "base")
    back = load(tmp_path / "a", loaded)
    assert [slot.method for slot in back.plan] == [replace(model.plan[0].method, init_scale=1e-3)]
    identical(back.steering["steering"], model.steering["linear"])


def test_linears_that_others_trained(loaded, over, tmp_path):
    """No identities beside the factors: the products are read."""
    written(steered(loaded, BLOCK), "vllm", tmp_path / "a", over)
    path, draw = tmp_path / "a" / "adapter_model.safetensors", np.random.default_rng(0)
    tensors = {name: draw.standard_normal(value.shape, np.float32) for name, value in load_file(path).items()}
    save_file(tensors, path)
    with pytest.raises(ValueError, match="--activation"):
        VLLM.read(tmp_path / "a", loaded, Given())
    back = VLLM.read(tmp_path / "a", loaded, Given(activation="tanh"))
    (slot,) = back.plan
    assert (slot.method.rank, slot.method.alpha, slot.method.activation, slot.layers) == (8, 1.0, "tanh", (0, 2))
    up = [tensors[f"base_model.model.model.layers.2.steer_up.lora_{part}.weight"] for part in "BA"]
    np.testing.assert_allclose(back.steering["steering"]["block"]["U"][1], 0.3 * up[0] @ up[1], 1e-5, 1e-5)


@pytest.mark.parametrize(
    ("texts", "words"),
    [
        ([BLOCK.replace("layers=0,2", "positions=last")], ["'steer'", "positions last", "jaxsteer itself"]),
        ([BLOCK, BLOCK.replace("steer", "two")], ["'two'", "'steer' has the place", "hf-steered"]),
        ([BLOCK.replace("0.3", "0.3, activation=tanh")], ["'steer'", "activation tanh", "silu"]),
        ([BLOCK.replace("rank=4", "rank=9")], ["'steer'", "rank 9", "--rank 9"]),
        ([BLOCK, "dora(rank=2) @ attn.q"], ["'dora'", "merge", "--to hf"]),
        (["fixed @ block"], ["'fixed'", "hf-steered"]),
        (["linear(rank=2) @ block"], ["'linear'", "activation none", "hf-steered"]),
        (["nonlinear(rank=2) @ attn"], ["'nonlinear'", "not affine"]),
    ],
)
def test_refusals_name_the_slot_and_an_alternative(loaded, over, texts, words):
    reasons = refused(steered(loaded, *texts), over)
    for word in words:
        assert word in reasons


def test_all_reasons_at_once(golden, loaded, over, tmp_path):
    reasons = refused(steered(loaded, BLOCK.replace("rank=4", "rank=9"), "dora(rank=2) @ attn.q"), over)
    assert reasons.count("\n") == 1
    gpt2 = load_model(golden / "families" / "gpt2")
    assert "GPT-2" in refused(steered(gpt2, BLOCK), over)
    assert "--to hf-steerable" in refused(steered(loaded, BLOCK), None)
    assert "no steerable base" in refused(steered(loaded, BLOCK), tmp_path)


def test_another_base_is_refused(golden, loaded, over, tmp_path):
    mistral = load_model(golden / "families" / "mistral")
    assert "of a llama, and this is a mistral" in refused(steered(mistral, BLOCK), over)
    wider = replace(loaded, config=replace(loaded.config, norm_eps=1e-3))
    assert "norm_eps" in refused(steered(wider, BLOCK), over)
    other = steered(loaded, BLOCK)
    base = jax.tree.map(lambda leaf: jnp.asarray(leaf) * 1.5, loaded.base)
    written(SteeredModel(replace(loaded, base=base), other.plan, other.steering), "hf-steerable", tmp_path / "other")
    assert refused(other, tmp_path / "other") == ""  # only the weights tell
    with pytest.raises(ValueError, match="another model"):
        VLLM.reduce(other, WriteOptions(over=tmp_path / "other"))


def test_ranks_that_vllm_reserves_memory_for():
    assert [max_lora_rank([2, rank]) for rank in (1, 8, 9, 300, 512, 513)] == [8, 8, 16, 320, 512, None]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: {k: v for k, v in t.items() if "2.steer_up" not in k}, "no tensors for model.layers.2.steer_up"),
        (lambda t: {k: v[:0] for k, v in t.items()}, "outputs"),
        (lambda t: {k: v[:, :1] for k, v in t.items()}, "shape"),
        (lambda t: {k.replace("layers.2", "layers.7"): v for k, v in t.items()}, "layers.7"),
    ],
)
def test_damaged_files(loaded, over, tmp_path, change, message):
    written(steered(loaded, BLOCK), "vllm", tmp_path / "a", over)
    path = tmp_path / "a" / "adapter_model.safetensors"
    save_file({name: np.ascontiguousarray(value) for name, value in change(load_file(path)).items()}, path)
    with pytest.raises(ValueError, match=message):
        VLLM.read(tmp_path / "a", loaded, Given(activation="silu"))
