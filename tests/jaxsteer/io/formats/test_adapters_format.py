"""AdapterHub folders: what adapters wrote is read with its own result, what is written is read back bit for bit."""

import json
import math
import re

import pytest
from exported import check_theirs, family_model, refusals, steered_of, theirs, written
from safetensors.numpy import load_file, save_file
from tiny import identical

from jaxsteer.io.files import read_json
from jaxsteer.io.formats import Given, adapters
from jaxsteer.plans import format_plan

READ = {
    "linear": ("linear(rank=2) @ block",),
    "mistral": ("nonlinear(rank=3, alpha=-2.0, activation=gelu) @ block layers=1,3",),
    "plain": ("nonlinear(rank=4) @ block",),
    "seq-bn": (
        "nonlinear(rank=2, alpha=0.7, activation=relu) @ block layers=0,2",
        "nonlinear(rank=3, alpha=0.7, activation=relu) @ block layers=1 name=nonlinear_2",
    ),
}


@pytest.fixture(scope="module")
def llama(golden):
    return family_model(golden, "llama")


def test_every_case_is_tested(golden):
    assert sorted(READ) == sorted(theirs(golden, "adapters"))


@pytest.mark.parametrize("case", [pytest.param(c, marks=[pytest.mark.slow] * (c == "mistral")) for c in READ])
def test_their_own_files_give_their_own_logits(golden, case):
    assert format_plan(check_theirs("adapters", golden, case).plan) == READ[case]


@pytest.mark.parametrize(
    "text",
    [
        "nonlinear(rank=5, alpha=2, activation=tanh, init_scale=0.1) @ block layers=0,2 name=mine",
        "nonlinear(rank=48, activation=silu) @ block layers=0,1,2",
        "linear(rank=7, alpha=0.3) @ block",
    ],
)
def test_what_is_written_is_read_back_bit_for_bit(llama, tmp_path, text):
    steered = steered_of(llama, text)
    reduced = written(adapters, steered, tmp_path, name="other")
    assert adapters.recognises(tmp_path)
    read = adapters.read(tmp_path, llama, Given())
    assert read.plan == reduced.plan
    identical(read.steering, reduced.steering)
    identical(list(read.steering.values()), list(steered.steering.values()))
    assert read_json(tmp_path / "adapter_config.json")["name"] == "other"


@pytest.mark.parametrize("width", [48, 576, 768, 4096])
def test_every_rank_has_a_reduction_factor(width):
    for rank in range(1, 257):
        factor = adapters.factor_for(rank, width)
        assert factor is not None
        assert int(width // factor) == rank


@pytest.mark.parametrize(
    ("texts", "words"),
    [
        (("nonlinear @ block positions=last",), r"positions last.*jaxsteer itself"),
        (("nonlinear @ mlp",), r"after the block.*hf-steered"),
        (("lora @ attn.q",), r"after the block.*hf-steered"),
        (("nonlinear @ block layers=0", "nonlinear @ block layers=1 name=b"), r"one slot.*has 2"),
    ],
)
def test_what_is_no_adapter_is_refused(llama, texts, words):
    assert re.search(words, refusals(adapters, llama, *texts)[0])


def test_other_families_are_refused(golden):
    gemma = family_model(golden, "gemma2")
    assert re.search("gemma2.*llama and mistral", refusals(adapters, gemma, "nonlinear @ block")[0])
    with pytest.raises(ValueError, match="the model is gemma2"):
        adapters.read(golden / "interop/adapters" / "plain", gemma, Given())


@pytest.fixture
def folder(llama, tmp_path):
    """A folder to damage."""
    written(adapters, steered_of(llama, "nonlinear(rank=2) @ block"), tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model_type": "mistral"}, "model_type is 'mistral'"),
        ({"hidden_size": 47}, "hidden_size is 47"),
        ({"version": None}, "name and version"),
        ({"config": None}, "no object `config`"),
        ({"config": {"mh_adapter": True}}, "mh_adapter is True"),
        ({"config": {"phm_layer": True}}, "phm_layer"),
        ({"config": {"inv_adapter": "nice"}}, "inv_adapter"),
        ({"config": {"original_ln_before": False}}, "after the block"),
        ({"config": {"residual_before_ln": "post_add"}}, "after the block"),
        ({"config": {"scaling": "learned"}}, "scaling is 'learned'"),
        ({"config": {"scaling": 1}}, "decimal point"),
        ({"config": {"scaling": math.inf}}, "scaling is"),
        ({"config": {"non_linearity": "gelu_new"}}, "non_linearity is 'gelu_new'"),
        ({"config": {"reduction_factor": 0}}, "reduction_factor is 0"),
        ({"config": {"reduction_factor": {"0": 24}}}, "nothing for layer 1"),
        ({"config": {"reduction_factor": 1e-300}}, "above the width"),
        ({"config": {"reduction_factor": 12}}, r"has shape \[2, 48\], expected \[4, 48\]"),
        ({"config": {"leave_out": [0]}}, "has the unknown"),
        ({"config": {"leave_out": "0"}}, "leave_out is"),
        ({"config": {"some_future_field": 1}}, "some_future_field is not supported"),
        ({"name": "other"}, "has no model.layers.0.output_adapters.adapters.other."),
    ],
)
def test_a_config_that_cannot_be_computed_is_refused(llama, folder, changes, words):
    path = folder / "adapter_config.json"
    raw = read_json(path)
    if changes.get("config"):
        changes = {"config": raw["config"] | changes["config"]}
    path.write_text(json.dumps(raw | changes))
    with pytest.raises(ValueError, match=words):
        adapters.read(folder, llama, Given())


@pytest.mark.parametrize("part", ["adapter_down.0.bias", "adapter_up.bias"])
def test_biases_are_refused(llama, folder, part):
    path = folder / "adapter.safetensors"
    tensors = load_file(path)
    tensors[f"model.layers.1.output_adapters.adapters.jaxsteer.{part}"] += 0.1
    save_file(tensors, path)
    with pytest.raises(ValueError, match="layer 1 has biases"):
        adapters.read(folder, llama, Given())


def test_names_within_the_model_are_read_too(llama, folder):
    before = adapters.read(folder, llama, Given())
    path = folder / "adapter.safetensors"
    save_file({name.removeprefix("model."): tensor for name, tensor in load_file(path).items()}, path)
    identical(adapters.read(folder, llama, Given()).steering, before.steering)


def test_without_a_model_it_is_asked_for(folder):
    with pytest.raises(ValueError, match="--model"):
        adapters.read(folder, None, Given())
