"""MLX-LM folders: what MLX-LM wrote is read with its own result, what is written is read back bit for bit."""

import json
import math
from functools import partial

import numpy as np
import pytest
from exported import check_theirs, family_model, refusals, same_updates, steered_of, theirs, written
from safetensors.numpy import load_file, save_file
from tiny import identical

from jaxsteer.io.files import read_json
from jaxsteer.io.formats import Given, WriteOptions, mlx
from jaxsteer.plans import format_plan

READ = {
    "all": "lora(rank=2, alpha=40.0) @ attn.k,attn.o,attn.q,attn.v,mlp.down,mlp.gate,mlp.up",
    "dora": "dora(rank=2, alpha=3.0) @ attn.o,mlp.down name=lora",
    "fused": "lora(rank=2, alpha=6.0) @ attn.k,attn.q,attn.v,mlp.gate,mlp.up layers=1,2,3",
    "lora": "lora(rank=3, alpha=7.5) @ attn.q,mlp.up layers=1,2",
}


@pytest.fixture(scope="module")
def model(golden):
    """(family, or folder) -> the model."""
    return partial(family_model, golden)


def test_every_case_is_tested(golden):
    assert sorted(READ) == sorted(theirs(golden, "mlx"))


@pytest.mark.parametrize("case", READ)
def test_their_own_files_give_their_own_logits(golden, case):
    assert format_plan(check_theirs("mlx", golden, case).plan) == (READ[case],)


ROUND_TRIPS = {
    "lora": ("llama", "lora(rank=3, alpha=7) @ attn.q,mlp.down layers=1,2"),
    "ranks": ("llama", "lora(rank=3, alpha=1) @ attn.q layers=1", "lora(rank=2, alpha=8) @ attn.o name=b"),
    "pissa": ("llama", "pissa(rank=2, alpha=3) @ mlp.up,attn.v"),
    "dora and rslora": ("llama", "dora(rank=2) @ mlp.up layers=0,1", "rslora(rank=3) @ attn.q name=b"),
    "fused": ("phi3", "lora(rank=2) @ projections layers=1,3", "lora(rank=3) @ mlp.down layers=0 name=b"),
    "fused dora": ("phi3", "dora(rank=2) @ attn.k,mlp.up"),
}


@pytest.mark.parametrize("case", ROUND_TRIPS)
def test_what_is_written_is_read_back_bit_for_bit_and_is_the_same_map(model, tmp_path, case):
    base, *plan = ROUND_TRIPS[case]
    steered = steered_of(model(base), *plan)
    reduced = written(mlx, steered, tmp_path)
    read = mlx.read(tmp_path, steered.loaded, Given())
    assert read.plan == reduced.plan
    identical(read.steering, reduced.steering)
    same_updates(read, steered)


def test_lora_of_one_rank_and_scale_is_stored_as_it_is(model, tmp_path):
    steered = steered_of(model("llama"), ROUND_TRIPS["lora"][1])
    written(mlx, steered, tmp_path)
    identical(mlx.read(tmp_path, steered.loaded, Given()).steering, steered.steering)
    assert read_json(tmp_path / "adapter_config.json") == {
        "model": None,
        "fine_tune_type": "lora",
        "num_layers": 2,
        "lora_parameters": {"rank": 3, "scale": 7 / 3, "dropout": 0.0, "keys": ["self_attn.q_proj", "mlp.down_proj"]},
    }


def test_padding_is_said(model):
    lost = mlx.reduce(steered_of(model("llama"), *ROUND_TRIPS["ranks"][1:]), WriteOptions()).lost
    assert "padded" in lost[0]


def test_gpt2_is_refused_both_ways(model, golden):
    assert "gpt2" in refusals(mlx, model("gpt2"), "lora @ attn.q")[0]
    with pytest.raises(ValueError, match="gpt2"):
        mlx.read(golden / "interop/mlx" / "lora", model("gpt2"), Given())


@pytest.fixture
def folder(model, tmp_path):
    """A folder to damage."""
    written(mlx, steered_of(model("llama"), "lora(rank=2) @ attn.q layers=1,2"), tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"fine_tune_type": "full"}, "mlx_lm.fuse"),
        ({"fine_tune_type": "dora"}, "expected lora_a, lora_b, m"),
        ({"lora_parameters": [1]}, "no object lora_parameters"),
        ({"num_layers": None}, "num_layers is None"),
        ({"num_layers": 1}, r"holds model.layers.1.self_attn.q_proj.lora_a"),
        ({"rank": 3}, r"has shape \[48, 2\], expected \[48, 3\]"),
        ({"rank": True}, "rank is True"),
        ({"scale": "2"}, "scale is '2'"),
        ({"scale": math.nan}, "scale is nan"),
        ({"alpha": 16}, "old version"),
        ({"keys": ["self_attn.k_proj"]}, "does not target"),
        ({"keys": "self_attn.q_proj"}, "expected a list of names"),
    ],
)
def test_a_config_that_cannot_be_computed_is_refused(model, folder, changes, words):
    path = folder / "adapter_config.json"
    raw = read_json(path)
    top = {key: value for key, value in changes.items() if key in raw}
    inner = {key: value for key, value in changes.items() if key not in raw}
    raw["lora_parameters"] |= inner
    path.write_text(json.dumps(raw | top))
    with pytest.raises(ValueError, match=words):
        mlx.read(folder, model("llama"), Given())


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model.layers.1.self_attn.q_proj.lora_a": None}, "has lora_b; expected lora_a, lora_b"),
        ({"model.layers.1.self_attn.q_proj.bias": np.ones(48, np.float32)}, "does not target"),
        ({"model.layers.1.self_attn.q_proj.lora_b": np.full((2, 48), np.nan, np.float32)}, "not finite"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(model, folder, changes, words):
    path = folder / "adapters.safetensors"
    tensors = load_file(path) | changes
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, path)
    with pytest.raises(ValueError, match=words):
        mlx.read(folder, model("llama"), Given())


def test_all_layers_and_keys_are_the_default(model, folder):
    path = folder / "adapter_config.json"
    raw = read_json(path)
    before = mlx.read(folder, model("llama"), Given())
    del raw["lora_parameters"]["keys"]
    path.write_text(json.dumps(raw | {"num_layers": -1, "model": "owner/name"}))
    identical(mlx.read(folder, model("llama"), Given()).steering, before.steering)
    assert mlx.FORMAT.base(folder) == "owner/name"


def test_without_a_model_it_is_asked_for(folder):
    with pytest.raises(ValueError, match="--model"):
        mlx.read(folder, None, Given())
