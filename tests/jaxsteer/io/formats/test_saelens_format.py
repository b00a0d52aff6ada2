"""Autoencoders that SAELens saved, against logits of TransformerLens steered with a row (make_interop_sources.py)."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
from imported import changed, check_answers
from safetensors.numpy import load_file, save_file

from jaxsteer.io import load_model
from jaxsteer.io.formats import FORMATS, Given

read = FORMATS["saelens"].read
GIVEN = Given(feature=7, strength=-2.5)
PLACES = {"post": ("block", 1), "pre": ("block", 0), "mlp": ("mlp", 2), "attn": ("attn", 0), "bf16": ("block", 0)}


@pytest.fixture(scope="module")
def folder(golden):
    return golden / "interop" / "saelens"


@pytest.mark.parametrize("case", PLACES)
def test_computes_what_transformer_lens_computes(folder, golden_llama, case):
    steered = check_answers(folder, case, golden_llama, GIVEN)
    (slot,) = steered.plan
    assert (slot.sites[0], slot.layers[0]) == PLACES[case]
    row = load_file(folder / case / "sae_weights.safetensors")["W_dec"][7].astype(np.float32)
    np.testing.assert_array_equal(steered.steering["fixed"][slot.sites[0]]["v"][0], np.float32(-2.5) * row)
    assert not steered.lost


def with_hook(folder, target, name, **fields):
    metadata = json.loads((folder / "post" / "cfg.json").read_text())["metadata"]
    return changed(folder / "post", target, "cfg.json", metadata=metadata | {"hook_name": name}, **fields)


@pytest.mark.parametrize(
    ("hook", "place"),
    [
        ("model.layers.2", ("block", 2)),
        ("transformer.h.1", ("block", 1)),
        ("model.layers.0.mlp", ("mlp", 0)),
        ("model.layers.2.self_attn", ("attn", 2)),
        ("blocks.2.hook_resid_pre", ("block", 1)),
    ],
)
def test_names_of_places(folder, golden_llama, tmp_path, hook, place):
    (slot,) = read(with_hook(folder, tmp_path / "x", hook), golden_llama, GIVEN).plan
    assert (slot.sites[0], slot.layers[0]) == place


@pytest.mark.parametrize(
    ("hook", "words"),
    [
        ("blocks.0.hook_resid_pre", "is the embedding"),
        ("blocks.3.hook_resid_post", "steers layer 3; tiny_llama has layers 0 to 2"),
        ("blocks.0.attn.hook_z", "those that are read are"),
        ("blocks.0.hook_resid_mid", "those that are read are"),
        ("blocks.٣.hook_resid_post\n", "those that are read are"),
        ("../../blocks.0.hook_resid_post", "those that are read are"),
        (None, "hook_name is None"),
        (7, "hook_name is 7"),
    ],
)
def test_places_that_are_not_read(folder, golden_llama, tmp_path, hook, words):
    with pytest.raises(ValueError, match=words):
        read(with_hook(folder, tmp_path / "x", hook), golden_llama, GIVEN)


def test_modules_before_a_norm_are_refused(folder, golden, tmp_path):
    gemma2 = load_model(golden / "families" / "gemma2")
    target = with_hook(folder, tmp_path / "x", "model.layers.0.mlp", d_in=gemma2.config.width)
    tensors = load_file(target / "sae_weights.safetensors")
    tensors["W_dec"] = np.ascontiguousarray(tensors["W_dec"][:, : gemma2.config.width])
    save_file(tensors, target / "sae_weights.safetensors")
    with pytest.raises(ValueError, match="before the norm"):
        read(target, gemma2, GIVEN)


def test_settings_before_version_6(folder, golden_llama, tmp_path):
    target = changed(
        folder / "post",
        tmp_path / "x",
        "cfg.json",
        metadata=...,
        architecture=...,
        hook_point="blocks.1.hook_resid_post",
    )
    assert read(target, golden_llama, GIVEN).plan[0].layers == (1,)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"architecture": "transcoder"}, "architecture is 'transcoder'"),
        ({"architecture": ["standard"]}, "architecture is"),
        ({"normalize_activations": "layer_norm"}, "normalises the activations of each token"),
        ({"normalize_activations": "constant_norm_rescale"}, "normalises the activations of each token"),
        ({"normalize_activations": "other"}, "which jaxsteer does not know"),
        ({"normalize_activations": {}}, "which jaxsteer does not know"),
        ({"reshape_activations": "hook_z"}, "reshapes activations"),
        ({"d_in": 64}, "d_in is 64 in cfg.json, 48 by W_dec"),
        ({"d_sae": float("nan")}, "d_sae is nan"),
        ({"metadata": []}, "expected an object"),
    ],
)
def test_settings_that_are_not_read(folder, golden_llama, tmp_path, fields, words):
    with pytest.raises(ValueError, match=words):
        read(changed(folder / "post", tmp_path / "x", "cfg.json", **fields), golden_llama, GIVEN)


def test_a_factor_that_is_not_stored_is_said(folder, golden_llama, tmp_path):
    fields = {"normalize_activations": "expected_average_only_in"}
    steered = read(changed(folder / "post", tmp_path / "x", "cfg.json", **fields), golden_llama, GIVEN)
    assert "factor that its files do not hold" in steered.lost[0]


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"feature": 10}, "has features 0 to 9"),
        ({"feature": -1}, "--feature is -1"),
        ({"feature": True}, "--feature is True"),
        ({"strength": float("nan")}, "--strength is nan"),
        ({"strength": 1e308}, "not finite"),
        ({"feature": None, "strength": None}, r"give --feature \(.*\), --strength \("),
    ],
)
def test_what_is_given_is_checked(folder, golden_llama, given, words):
    with pytest.raises(ValueError, match=words):
        read(folder / "post", golden_llama, replace(GIVEN, **given))
    with pytest.raises(ValueError, match=r"give --model .*--feature .*--strength"):
        read(folder / "post", None, Given())


def test_files_that_are_missing(folder, golden_llama, tmp_path):
    for name, words in (("cfg.json", "no such file"), ("sae_weights.safetensors", "no such file")):
        target = shutil.copytree(folder / "post", tmp_path / name)
        (target / name).unlink()
        with pytest.raises(ValueError, match=words):
            read(target, golden_llama, GIVEN)
    assert not FORMATS["saelens"].recognises(tmp_path)
