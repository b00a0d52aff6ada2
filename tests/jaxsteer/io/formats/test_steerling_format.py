"""Checkpoints with steerling's names and places, against logits computed on PyTorch (make_interop_sources.py)."""

import shutil
from dataclasses import replace

import numpy as np
import pytest
from imported import check_answers
from safetensors.numpy import load_file, save_file

from jaxsteer.io import load_model
from jaxsteer.io.formats import FORMATS, Given, peft
from jaxsteer.io.pickles import open_pickle

read = FORMATS["steerling"].read
CASES = {
    "block": Given(alpha=1.0, activation="silu", positions="all"),
    "submodules": Given(alpha=1.5, activation="none", positions="all"),
    "fixed": Given(positions="all"),
    "joint": Given(alpha=0.5, activation="tanh", positions="all"),
}


@pytest.fixture(scope="module")
def folder(golden):
    return golden / "interop" / "steerling"


@pytest.fixture(scope="module")
def gemma2(golden):
    return load_model(golden / "families" / "gemma2")


@pytest.mark.parametrize("case", CASES)
def test_computes_what_was_saved(folder, golden_llama, case):
    check_answers(folder, case, golden_llama, CASES[case])


def test_attn_is_behind_the_norm_of_gemma(folder, gemma2):
    steered = check_answers(folder, "gemma2", gemma2, Given(alpha=1.0, activation="gelu", positions="all"))
    assert steered.plan[0].sites == ("attn", "block")


def test_sites_and_layers(folder, golden_llama):
    (slot,) = read(folder / "submodules", golden_llama, CASES["submodules"]).plan
    assert (slot.sites, slot.layers, str(slot.positions)) == (("mlp", "mlp.in"), (0, 2), "all")
    assert read(folder / "fixed", golden_llama, CASES["fixed"]).plan[0].sites == ("block", "mlp.in")


def test_factors_are_those_of_the_file(folder, golden_llama):
    steered = read(folder / "block", golden_llama, CASES["block"])
    tensors = open_pickle(folder / "block" / "pytorch_model.bin")
    for i in range(3):
        for name, param in (("down", "D"), ("up", "U")):
            expected = tensors[f"adapters.layer{i}_block.{name}.weight"].read()
            np.testing.assert_array_equal(steered.steering["nonlinear"]["block"][param][i], expected)


def test_joint_folders_are_no_plain_lora(folder, golden_llama):
    joint = folder / "joint"
    assert peft.recognises(joint)
    assert next(name for name, format in FORMATS.items() if format.recognises(joint)) == "steerling"
    assert [slot.name for slot in read(joint, golden_llama, CASES["joint"]).plan] == ["lora", "nonlinear"]


def test_other_folders_are_not_steerlings(folder, golden, tmp_path):
    recognises = FORMATS["steerling"].recognises
    shutil.copy(folder / "joint" / "adapter_model.safetensors", tmp_path)
    others = [golden / "tiny_llama", tmp_path, tmp_path / "none", golden / "interop" / "pyreft" / "loreft"]
    assert not any(map(recognises, others))


def test_everything_that_is_missing_is_asked_for_at_once(folder, golden_llama):
    with pytest.raises(ValueError, match=r"give --model .*--positions .*--alpha .*--activation "):
        read(folder / "block", None, Given())
    with pytest.raises(ValueError, match=r"give --model [^-]*, --positions") as error:
        read(folder / "fixed", None, Given())
    assert "--alpha" not in str(error.value)
    with pytest.raises(ValueError, match="give --alpha"):
        read(folder / "joint", golden_llama, replace(CASES["joint"], alpha=None))


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"positions": "last"}, "--positions is last; steerling steers all tokens .*train it again"),
        ({"positions": "first:2"}, "--positions is first:2"),
        ({"alpha": float("nan")}, "--alpha is nan"),
        ({"alpha": float("inf")}, "--alpha is inf"),
        ({"activation": "swish"}, "--activation is 'swish'"),
    ],
)
def test_what_is_given_is_checked(folder, golden_llama, given, words):
    with pytest.raises(ValueError, match=words):
        read(folder / "block", golden_llama, replace(CASES["block"], **given))


def test_another_base_model_is_noticed(folder, golden_llama, gemma2):
    blocks = golden_llama.sample.blocks
    doubled = tuple(b._replace(values=b.values * 2) if b.leaf.startswith("final_norm") else b for b in blocks)
    other = replace(golden_llama, sample=replace(golden_llama.sample, digest="other", blocks=doubled))
    with pytest.raises(ValueError, match=r"trained on another base model than tiny_llama: .*final_norm"):
        read(folder / "block", other, CASES["block"])
    with pytest.raises(ValueError, match="the tensors are not those of a gemma2 model"):
        read(folder / "block", gemma2, CASES["block"])
    with pytest.raises(ValueError, match="has shape"):
        read(folder / "fixed", gemma2, CASES["fixed"])


def test_places_that_jaxsteer_does_not_steer(folder, golden, gemma2):
    with pytest.raises(ValueError, match="before the norm that this family has behind it"):
        read(folder / "submodules", gemma2, CASES["submodules"])
    gpt2 = load_model(golden / "families" / "gpt2")
    with pytest.raises(ValueError, match="Llama-like blocks only"):
        read(folder / "fixed", gpt2, CASES["fixed"])


@pytest.fixture
def fixed(folder, tmp_path):
    """(**tensors) -> a copy of the fixed vectors with some tensors replaced or added."""

    def write(**tensors):
        save_file(load_file(folder / "fixed" / "model.safetensors") | tensors, tmp_path / "model.safetensors")
        return tmp_path

    return write


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("deltas.layer3_block", np.zeros(48, np.float32), "steers layer 3; tiny_llama has layers 0 to 2"),
        ("deltas.layer0_head", np.zeros(48, np.float32), "'layer0_head' is no fixed vector"),
        ("deltas.layer00_block", np.zeros(48, np.float32), "two interventions at block of layer 0"),
        ("deltas.layer0_block.up.weight", np.zeros(48, np.float32), "is no fixed vector"),
        ("deltas.layer0_block", np.zeros(48, np.int32), "holds I32 values"),
        ("deltas.layer0_block", np.full(48, np.nan, np.float32), "not finite"),
        ("deltas.layer0_block", np.full(48, 1e308), "not finite"),
        ("adapters.layer0_block.up.weight", np.zeros((48, 4), np.float32), "expected either"),
    ],
)
def test_vectors_that_do_not_fit(fixed, golden_llama, name, value, words):
    with pytest.raises(ValueError, match=words):
        read(fixed(**{name: value}), golden_llama, CASES["fixed"])


def test_low_rank_needs_both_factors(golden_llama, tmp_path):
    save_file({"adapters.layer0_block.up.weight": np.zeros((48, 4), np.float32)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="layer0_block has up only, expected down and up"):
        read(tmp_path, golden_llama, CASES["block"])
    save_file({"adapters.layer0_block.down.bias": np.zeros(4, np.float32)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"'layer0_block\.down\.bias' is no adapter's weight"):
        read(tmp_path, golden_llama, CASES["block"])
    with pytest.raises(ValueError, match=r"holds none of pytorch_model\.bin"):
        read(tmp_path / "none", golden_llama, CASES["block"])
