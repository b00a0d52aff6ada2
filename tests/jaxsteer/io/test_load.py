import json
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import SingleDeviceSharding
from safetensors.numpy import load_file, save_file

from jaxsteer.io import compute_dtype, load_base, load_config, load_model, load_tokenizer
from jaxsteer.models.transformer import init_base


@pytest.fixture
def folder(golden, tmp_path):
    """A copy of a tiny model that a test may damage."""
    return shutil.copytree(golden / "tiny_llama", tmp_path / "model")


def rewrite(folder, change):
    tensors = dict(load_file(folder / "model.safetensors"))
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def edit(folder, name, **fields):
    path = folder / name
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


@pytest.mark.parametrize("name", ["tiny_llama", "tiny_llama_mha", "tiny_llama_rope"])
def test_layout_is_that_of_the_forward_pass(golden, name):
    model = load_model(golden / name)
    fresh = jax.eval_shape(lambda: init_base(model.config, jax.random.key(0)))
    assert jax.tree.map(lambda a: (a.shape, a.dtype), model.base) == jax.tree.map(lambda a: (a.shape, a.dtype), fresh)
    assert (model.name, model.family, model.stop_tokens) == (name, "llama", (2,))
    assert model.tokenizer is None
    with pytest.raises(ValueError, match=f"{name}: this model comes without a tokenizer"):
        model.require_tokenizer()


def test_values_and_orientation(golden):
    theirs = load_file(golden / "tiny_llama" / "model.safetensors")
    base = load_base(golden / "tiny_llama")
    for i in range(3):
        ours = base["blocks"]["attn"]["k"]["kernel"][i]
        np.testing.assert_array_equal(ours, theirs[f"model.layers.{i}.self_attn.k_proj.weight"].T)
    np.testing.assert_array_equal(base["head"]["embedding"], theirs["lm_head.weight"])
    np.testing.assert_array_equal(base["embed"]["embedding"], theirs["model.embed_tokens.weight"])


def test_dtype_progress_and_placement(golden):
    seen, placed = [], []
    base = load_base(
        golden / "tiny_llama",
        dtype=jnp.bfloat16,
        progress=lambda done, total: seen.append((done, total)),
        place=lambda path, shape: placed.append(path) or SingleDeviceSharding(jax.devices()[0]),
    )
    assert {leaf.dtype for leaf in jax.tree.leaves(base)} == {jnp.dtype(jnp.bfloat16)}
    exact = load_base(golden / "tiny_llama")["head"]["embedding"]
    np.testing.assert_array_equal(base["head"]["embedding"], exact.astype(jnp.bfloat16))
    done = [d for d, _ in seen]
    assert done == sorted(done)
    assert seen[-1] == (seen[0][1], seen[0][1])
    assert "blocks/attn/q/kernel" in placed


def test_dtype_by_name():
    names = {"auto": jnp.float32, "float32": jnp.float32, "bfloat16": jnp.bfloat16}  # tests run on CPU
    assert {name: compute_dtype(name) for name in names} == {name: jnp.dtype(kind) for name, kind in names.items()}
    with pytest.raises(ValueError, match="dtype: auto, float32 or bfloat16; got 'float16'"):
        compute_dtype("float16")


def test_bfloat16_files(folder):
    rewrite(folder, lambda t: t.update({k: v.astype(ml_dtypes.bfloat16) for k, v in t.items()}))
    base = load_base(folder)
    assert base["head"]["embedding"].dtype == jnp.float32
    np.testing.assert_array_equal(base["head"]["embedding"], load_base(folder, dtype=jnp.bfloat16)["head"]["embedding"])


def test_shards_give_the_same(golden, folder):
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    half = sorted(tensors)[::2]
    files = {"a.safetensors": half, "b.safetensors": [k for k in tensors if k not in half]}
    for name, keys in files.items():
        save_file({key: tensors[key] for key in keys}, folder / name)
    where = {key: name for name, keys in files.items() for key in keys}
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": where}))
    jax.tree.map(np.testing.assert_array_equal, load_base(folder), load_base(golden / "tiny_llama"))

    index.write_text(json.dumps({"weight_map": where | {half[0]: "b.safetensors"}}))
    with pytest.raises(ValueError, match="does not place there"):
        load_base(folder)
    index.write_text(json.dumps({"weight_map": where | {half[0]: "../a.safetensors"}}))
    with pytest.raises(ValueError, match="outside the folder"):
        load_base(folder)
    index.write_text(json.dumps({"weight_map": where}))
    (folder / "b.safetensors").unlink()
    with pytest.raises(ValueError, match=r"b\.safetensors: no such file"):
        load_base(folder)


def test_all_wrong_tensors_are_named_at_once(folder):
    def spoil(tensors):
        del tensors["model.layers.1.mlp.up_proj.weight"], tensors["model.norm.weight"]
        tensors["model.layers.0.self_attn.q_norm.weight"] = np.ones(12, np.float32)
        tensors["lm_head.weight"] = np.ones((97, 47), np.float32)

    rewrite(folder, spoil)
    with pytest.raises(ValueError, match="missing: ") as error:
        load_base(folder)
    for part in (
        "model.layers.1.mlp.up_proj.weight, model.norm.weight",
        "unknown: model.layers.0.self_attn.q_norm.weight",
        "lm_head.weight has shape [97, 47], expected [97, 48]",
    ):
        assert part in str(error.value)


def test_constants_and_a_repeated_tied_head_are_passed_over(golden, tmp_path):
    folder = shutil.copytree(golden / "tiny_llama_mha", tmp_path / "model")

    def add(tensors):
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(6, np.float32)
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]

    rewrite(folder, add)
    assert "head" not in load_base(folder)
    rewrite(folder, lambda t: t.update({"lm_head.weight": t["lm_head.weight"] + 1}))
    with pytest.raises(ValueError, match=r"unknown: lm_head\.weight"):
        load_base(folder)


def test_a_config_that_lies_is_caught_before_anything_is_allocated(folder):
    edit(folder, "config.json", num_hidden_layers=10**9, vocab_size=10**12)
    with pytest.raises(ValueError, match="misshapen"):
        load_base(folder)


@pytest.mark.parametrize("keep", [0, 5, 100, 3000, 262_000])
def test_truncated_weights(folder, keep):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"model\.safetensors: not a complete safetensors file"):
        load_base(folder)


@pytest.mark.parametrize(
    "header",
    [
        b"[]",
        b"{",
        b"[" * 100_000,
        b'{"a": {"dtype": "F32", "shape": [1000000000000], "data_offsets": [0, 8]}}',
        b'{"a": {"dtype": "F32", "shape": [4294967296, 4294967296], "data_offsets": [0, 0]}}',
        b'{"a": {"dtype": "F32", "shape": [-2, -1], "data_offsets": [0, 8]}}',
        b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [8, 16]}}',
        b'{"a": {"dtype": "Q9", "shape": [2], "data_offsets": [0, 8]}}',
        b'{"a": {"shape": [2]}}',
        b'{"a": 3}',
        b'{"__metadata__": {"a": 1}}',
    ],
)
def test_malformed_headers(folder, header):
    path = folder / "model.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
    with pytest.raises(ValueError, match="not a complete safetensors file"):
        load_base(folder)
    path.write_bytes((1 << 60).to_bytes(8, "little") + header)
    with pytest.raises(ValueError, match="not a complete safetensors file"):
        load_base(folder)


def test_integer_weights_are_refused(folder):
    rewrite(folder, lambda t: t.update({"lm_head.weight": np.ones((97, 48), np.int8)}))
    with pytest.raises(ValueError, match=r"lm_head\.weight is stored as I8"):
        load_base(folder)


@pytest.mark.parametrize(
    ("said", "expected"), [({"eos_token_id": [2, 5, 2]}, (2, 5)), ({"eos_token_id": 7}, (7,)), ({}, (2,))]
)
def test_stop_tokens(folder, said, expected):
    (folder / "generation_config.json").write_text(json.dumps(said))
    assert load_model(folder).stop_tokens == expected


def test_sources_that_are_not_there(tmp_path, monkeypatch):
    for source in (tmp_path / "nothing", "nothing.gguf", "models/nothing.gguf", "a/b/c"):
        with pytest.raises(ValueError, match="no such folder"):
            load_config(source)
    with pytest.raises(ValueError, match=r"config\.json: no such file"):
        load_config(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "lla')
    with pytest.raises(ValueError, match=r"config\.json: not valid JSON"):
        load_config(tmp_path)
    with pytest.raises(ValueError, match="no tokenizer here"):
        load_tokenizer(tmp_path)
    with pytest.raises(ValueError, match="for safetensors give their folder"):
        load_config(tmp_path / "config.json")


def test_hub_ids(golden, monkeypatch):
    hub = pytest.importorskip("huggingface_hub")
    asked = []

    def download(name, allow_patterns):
        asked.append((name, allow_patterns))
        if name == "owner/gone":
            raise OSError("404 Client Error\nand more")
        return str(golden / "tiny_llama")

    monkeypatch.setattr(hub, "snapshot_download", download)
    model = load_model("owner/model")
    assert (model.name, model.config.width) == ("owner/model", 48)
    assert "model*.safetensors" in asked[0][1]
    load_config("owner/model")
    assert "model*.safetensors" not in asked[1][1]
    with pytest.raises(ValueError, match="not a local path, and the Hugging Face Hub gave nothing"):
        load_model("owner/gone")


def test_importing_costs_no_heavy_package():
    heavy = ["transformers", "tokenizers", "gguf", "huggingface_hub", "torch"]
    code = f"import sys, jaxsteer.io; print([m for m in {heavy} if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"
