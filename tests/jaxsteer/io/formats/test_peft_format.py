"""PEFT folders: what peft wrote is read with peft's own result, what is written is read back bit for bit."""

import json
import math
import re
import shutil
import zipfile
from functools import partial

import jax.numpy as jnp
import numpy as np
import pytest
from exported import check_theirs, family_model, refusals, same_updates, steered_of, theirs, written
from safetensors.numpy import load_file, save_file
from tiny import close, identical

from jaxsteer.folding import fold_all
from jaxsteer.io.files import read_json
from jaxsteer.io.formats import Given, WriteOptions, peft
from jaxsteer.io.formats.updates import alpha_for
from jaxsteer.plans import format_plan, parse_plan

CASES = ("conv1d-dora", "conv1d-pissa", "dora", "excluded", "fused-dora", "lora", "patterns", "pissa", "rslora")
MORE = ("all-linear", "conv1d", "fused", "pissa-converted")
"""Cases of which the others have all parts."""
LLAMA, GPT2, PHI3 = "llama", "gpt2", "phi3"


@pytest.fixture(scope="module")
def model(golden):
    """(family, or folder) -> the model."""
    return partial(family_model, golden)


def test_every_case_is_tested(golden):
    assert sorted((*CASES, *MORE)) == sorted(theirs(golden, "peft"))


@pytest.mark.parametrize("case", [*CASES, *(pytest.param(case, marks=pytest.mark.slow) for case in MORE)])
def test_pefts_own_files_give_pefts_own_logits(golden, case):
    check_theirs("peft", golden, case)


ROUND_TRIPS = {
    "lora": (LLAMA, "lora(rank=3, alpha=7) @ attn.q,mlp.down", "lora(rank=2, alpha=0.3) @ attn.o layers=1 name=b"),
    "same site": (LLAMA, "lora(rank=3, alpha=1) @ attn.q layers=0,1", "lora(rank=2, alpha=8) @ attn.q name=b"),
    "rslora": (LLAMA, "rslora(rank=3, alpha=7) @ projections layers=0,2"),
    "pissa": (LLAMA, "pissa(rank=2, alpha=3) @ mlp.up,attn.v"),
    "dora": (LLAMA, "dora(rank=2) @ mlp.up,attn.v"),
    "dora and lora": (LLAMA, "dora(rank=2) @ mlp.up layers=0,1", "lora(rank=3, alpha=1) @ attn.q name=b"),
    "affine": (LLAMA, "linear(rank=2) @ mlp", "linear(rank=3) @ mlp.in name=b", "lora @ mlp.down name=c"),
    "gpt2": (GPT2, "lora(rank=2) @ attn.q,attn.o,mlp.down", "lora(rank=3, alpha=1) @ attn.v layers=1,2 name=b"),
    "gpt2 dora": (GPT2, "dora(rank=2) @ attn.k,mlp.up", "lora(rank=2) @ attn.q name=b"),
    "phi3": (PHI3, "lora(rank=2) @ projections"),
    "phi3 dora": (PHI3, "dora(rank=2) @ projections layers=0,3"),
}


FOLDED = ("same site", "pissa", "dora", "affine")
"""Cases whose merged weights are compared too, by code that knows nothing of LoRA folders; that takes most time."""


@pytest.mark.parametrize("case", ROUND_TRIPS)
def test_what_is_written_is_read_back_bit_for_bit_and_computes_the_same(model, tmp_path, case):
    base, *plan = ROUND_TRIPS[case]
    steered = steered_of(model(base), *plan)
    reduced = written(peft, steered, tmp_path)
    read = peft.read(tmp_path, steered.loaded, Given())
    assert read.plan == reduced.plan
    identical(read.steering, reduced.steering)
    same_updates(read, steered)
    if case in FOLDED:
        before, after = (fold_all(s.loaded.config, s.plan, s.base, s.steering) for s in (steered, read))
        close(after.base, before.base, 1e-6)
        assert after.plan == before.plan == ()


def test_lora_is_stored_as_it_is(model, tmp_path):
    steered = steered_of(model(LLAMA), *ROUND_TRIPS["lora"][1:])
    written(peft, steered, tmp_path)
    read = peft.read(tmp_path, steered.loaded, Given())
    assert format_plan(read.plan) == (
        "lora(rank=3, alpha=7.0) @ attn.q,mlp.down",
        "lora(rank=2, alpha=0.3) @ attn.o layers=1 name=lora_2",
    )
    identical(read.steering, {"lora": steered.steering["lora"], "lora_2": steered.steering["b"]})


def test_the_scale_is_the_same_to_the_last_bit():
    draw = np.random.default_rng(0)
    for rank in range(1, 200):
        for alpha in (1, rank, 16, math.sqrt(rank), float(draw.uniform(0, 30))):
            assert alpha_for(alpha / rank, rank) / rank == alpha / rank
            nearest = alpha_for(alpha / math.sqrt(rank), rank) / rank
            assert nearest == pytest.approx(alpha / math.sqrt(rank), rel=3e-16)


@pytest.mark.parametrize(
    ("base", "plan", "fields"),
    [
        (LLAMA, ("lora(rank=4, alpha=8) @ attn.q,mlp.up",), {"target_modules": ["q_proj", "up_proj"], "r": 4}),
        (
            LLAMA,
            ("lora @ attn.q layers=0,2",),
            {"target_modules": ["q_proj"], "layers_to_transform": [0, 2], "layers_pattern": "layers"},
        ),
        (
            LLAMA,
            ("lora @ attn.q layers=0,2", "lora @ attn.k layers=1 name=b"),
            {"target_modules": [f"model.layers.{i}.self_attn.{x}_proj" for i, x in ((0, "q"), (2, "q"), (1, "k"))]},
        ),
        (
            LLAMA,
            ("lora(rank=2, alpha=1) @ attn.q,attn.k", "lora(rank=3, alpha=8) @ attn.v layers=0,1 name=b"),
            {"r": 2, "lora_alpha": 1, "rank_pattern": {"v_proj": 3}, "alpha_pattern": {"v_proj": 8}},
        ),
        (
            LLAMA,
            ("lora(rank=2) @ attn.q,attn.k layers=0,1", "lora(rank=3) @ attn.q layers=2 name=b"),
            {"r": 2, "lora_alpha": 8, "rank_pattern": {"model.layers.2.self_attn.q_proj": 3}, "alpha_pattern": {}},
        ),
        (LLAMA, ("rslora(rank=4, alpha=8) @ attn.q",), {"lora_alpha": 16, "use_dora": False}),
        (LLAMA, ("pissa(rank=2, alpha=3) @ attn.q",), {"r": 4, "lora_alpha": 6}),
        (LLAMA, ("dora(rank=2) @ attn.q",), {"use_dora": True, "fan_in_fan_out": False}),
        (GPT2, ("lora @ attn.q,attn.o",), {"target_modules": ["c_attn", "attn.c_proj"], "fan_in_fan_out": True}),
    ],
)
def test_the_config_says_it_shortly_and_exactly(model, tmp_path, base, plan, fields):
    written(peft, steered_of(model(base), *plan), tmp_path)
    config = read_json(tmp_path / "adapter_config.json")
    assert {field: config[field] for field in fields} == fields
    assert "use_rslora" not in config
    assert ("layers_to_transform" in config) == ("layers_to_transform" in fields)


@pytest.mark.parametrize(
    ("source", "named"),
    [("owner/model-1.7B", "owner/model-1.7B"), ("", None), ("smollm2-135m-instruct", None), ("../models/x", None)],
)
def test_only_a_hub_id_is_named_as_the_base(model, tmp_path, source, named):
    written(peft, steered_of(model(LLAMA), "lora @ attn.q", source=source), tmp_path)
    assert read_json(tmp_path / "adapter_config.json")["base_model_name_or_path"] == named


def test_a_local_path_is_not_named_as_the_base(tmp_path, monkeypatch):
    (tmp_path / "models" / "mine").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert peft.hub_id("models/mine") is None
    assert peft.hub_id("models/other") == "models/other"


@pytest.mark.parametrize(
    ("plan", "words"),
    [
        (("nonlinear @ block",), "hf-steerable"),
        (("lora @ attn.q positions=last",), "positions last"),
        (("fixed @ mlp",), "a shift needs a bias"),
        (("dora @ attn.q", "lora @ attn.q name=b"), "another slot updates its projections"),
    ],
)
def test_what_is_no_lora_is_refused_with_the_slots_name(model, plan, words):
    loaded = model(LLAMA)
    assert re.search(rf"slot '{parse_plan(plan, loaded.config)[0].name}'.*{words}", refusals(peft, loaded, *plan)[0])


def test_a_plan_without_slots_is_refused(model):
    assert "no slots" in refusals(peft, model(LLAMA))[0]


def test_what_is_lost_is_said(model):
    steered = steered_of(model(LLAMA), "pissa(rank=2) @ attn.q", "lora(dropout=0.1) @ attn.k", "lora @ attn.v name=c")
    first, second = peft.reduce(steered, WriteOptions()).lost
    assert "slot 'pissa'" in first
    assert "dropout 0.1" in second


@pytest.fixture
def folder(model, tmp_path):
    """A folder to damage."""
    written(peft, steered_of(model(LLAMA), "lora(rank=2, alpha=3) @ attn.q,mlp.down"), tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"peft_type": "IA3"}, "only LORA"),
        ({"bias": "all"}, "trained biases"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save is .*lm_head"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices"),
        ({"lora_bias": True}, "lora_bias"),
        ({"some_future_field": 1}, "some_future_field"),
        ({"init_lora_weights": "olora"}, "path_initial_model_for_weight_conversion"),
        ({"init_lora_weights": "pissa_niter_16"}, "changes the base model"),
        ({"init_lora_weights": "pissa", "lora_alpha": -3}, "alpha above 0"),
        ({"r": 3}, "has shape"),
        ({"r": True}, "r is True"),
        ({"r": None}, "r is None"),
        ({"lora_alpha": "8"}, "lora_alpha is '8'"),
        ({"lora_alpha": math.nan}, "lora_alpha is"),
        ({"lora_alpha": 10**400}, "lora_alpha is"),
        ({"rank_pattern": {"q_proj": 2.5}}, "rank_pattern"),
        ({"alpha_pattern": [1]}, "alpha_pattern"),
        ({"alpha_pattern": {"(": 1}}, "alpha_pattern has no usable pattern"),
        ({"target_modules": None}, "target_modules is"),
        ({"target_modules": ["q_proj"]}, "does not target it"),
        ({"target_modules": r"(.*\.)*(.*\.)*(.*\.)*(.*\.)*(.*\.)*q_prox"}, "target_modules|target"),
        ({"target_modules": "all-linear"}, "has no tensors for"),
        ({"exclude_modules": ["q_proj"]}, "does not target it"),
        ({"layers_to_transform": [0, 1]}, "does not target it"),
        ({"layers_to_transform": ["0"]}, "layers_to_transform is"),
        ({"use_dora": True}, "lora_magnitude_vector"),
    ],
)
def test_a_config_that_cannot_be_computed_is_refused(model, folder, changes, words):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(read_json(path) | changes))
    with pytest.raises(ValueError, match=words):
        peft.read(folder, model(LLAMA), Given())


NAME = "base_model.model.model.layers.1.self_attn.q_proj"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({f"{NAME}.lora_B.weight": None}, r"has lora_A.weight; expected lora_A.weight, lora_B.weight"),
        ({f"{NAME}.lora_A.weight": None, f"{NAME}.lora_B.weight": None}, "has no tensors for model.layers.1"),
        ({f"{NAME}.lora_A.weight": np.ones((2, 47), np.float32)}, r"has shape \[2, 47\], expected \[2, 48\]"),
        ({f"{NAME}.lora_magnitude_vector": np.ones(48, np.float32)}, "has lora_A.weight, lora_B.weight, lora_mag"),
        ({f"{NAME}.bias": np.ones(48, np.float32)}, "no LoRA of a projection"),
        ({"base_model.model.lm_head.lora_A.weight": np.ones((2, 48), np.float32)}, "the head are not supported"),
        ({NAME.replace(".1.", ".3.") + ".lora_A.weight": np.ones((2, 48), np.float32)}, "Is this its base"),
        ({"..lora_A.weight": np.ones((2, 48), np.float32)}, "no LoRA of a projection"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(model, folder, changes, words):
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path) | changes
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, path)
    with pytest.raises(ValueError, match=words):
        peft.read(folder, model(LLAMA), Given())


def test_a_pattern_that_takes_years_is_stopped(model, folder):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(read_json(path) | {"rank_pattern": {r"(.|.)*(.|.)*q(?!_).*": 2}}))
    with pytest.raises(ValueError, match="no usable pattern"):
        peft.read(folder, model(LLAMA), Given())


def test_half_precision_is_read_exactly(model, folder):
    path = folder / "adapter_model.safetensors"
    save_file({name: tensor.astype(np.float16) for name, tensor in load_file(path).items()}, path)
    leaf = peft.read(folder, model(LLAMA), Given()).steering["lora"]["attn.q"]["A"]
    assert leaf.dtype == jnp.float32
    np.testing.assert_array_equal(leaf[1], load_file(path)[f"{NAME}.lora_A.weight"].astype(np.float32))


def test_the_file_of_before_safetensors_is_read_alike(golden, model):
    old, new = (
        peft.read(golden / "interop/peft" / case, model("smollm3"), Given()) for case in ("pickled", "excluded")
    )
    assert peft.recognises(golden / "interop/peft/pickled")
    assert old.plan == new.plan
    identical(old.steering, new.steering)


@pytest.mark.parametrize(
    ("pickle", "words"),
    [
        (b"\x80\x02cos\nsystem\nX\x09\x00\x00\x00touch RANR.", "asks for 'os.system', which is not run"),
        (b"\x80\x02}q\x00", "pickle exhausted before seeing STOP"),
        (None, "no zip archive"),
    ],
)
def test_a_pickle_that_is_damaged_or_carries_code_is_refused(golden, model, tmp_path, monkeypatch, pickle, words):
    monkeypatch.chdir(tmp_path)
    folder = shutil.copytree(golden / "interop/peft/pickled", tmp_path / "x")
    file = folder / "adapter_model.bin"
    if pickle is None:
        file.write_bytes(file.read_bytes()[100:])
    else:
        with zipfile.ZipFile(file, "w") as archive:
            archive.writestr("adapter_model/data.pkl", pickle)
    with pytest.raises(ValueError, match=rf"adapter_model\.bin: cannot be read as tensors of PyTorch: .*{words}"):
        peft.read(folder, model("smollm3"), Given())
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


def test_the_named_base(folder, model, tmp_path):
    assert peft.FORMAT.base(folder) is None
    written(peft, steered_of(model(LLAMA), "lora @ attn.q", source="owner/name"), folder)
    assert peft.FORMAT.base(folder) == "owner/name"


def test_without_a_model_it_is_asked_for(folder):
    with pytest.raises(ValueError, match="--model"):
        peft.read(folder, None, Given())


def test_other_folders_are_not_recognised(golden):
    assert not peft.recognises(golden / "tiny_llama")
    assert not peft.recognises(golden / "tiny_llama" / "config.json")
