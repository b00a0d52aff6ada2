import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from jaxsteer.io import load_config, load_model, save_hf
from jaxsteer.io.safetensors_file import ToWrite, write_safetensors


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("name", ["tiny_llama", "tiny_llama_mha", "tiny_llama_rope"])
def test_there_and_back_bit_for_bit(golden, tmp_path, name, dtype):
    first = load_model(golden / name, dtype=dtype)
    save_hf(tmp_path / name, first.config, first.base, first.family, stop_tokens=(2, 5))
    again = load_model(tmp_path / name, dtype=dtype)
    assert again.config == first.config
    assert again.stop_tokens == (2, 5)
    jax.tree.map(np.testing.assert_array_equal, again.base, first.base)
    theirs, ours = (load_file(f / name / "model.safetensors") for f in (golden, tmp_path))
    assert set(ours) == set(theirs)
    for key, value in theirs.items():
        np.testing.assert_array_equal(ours[key], value.astype(ours[key].dtype))
    assert not list((tmp_path / name).glob(".*"))


def test_from_gguf(golden, tmp_path, write_gguf):
    from_gguf = load_model(write_gguf(golden / "tiny_llama", load_config(golden / "tiny_llama")))
    save_hf(tmp_path / "out", from_gguf.config, from_gguf.base, "llama", from_gguf.tokenizer)
    again = load_model(tmp_path / "out")
    theirs = load_file(golden / "tiny_llama" / "model.safetensors")
    for key, value in load_file(tmp_path / "out" / "model.safetensors").items():
        np.testing.assert_array_equal(value, theirs[key])
    text = "ab 1<tool>c<eos>"
    assert again.tokenizer.encode(text) == from_gguf.tokenizer.encode(text)
    assert again.tokenizer.chat_template == from_gguf.tokenizer.chat_template
    assert again.stop_tokens == (0,)


def test_a_tree_that_does_not_fit_is_refused_before_anything_is_written(golden, tmp_path):
    model = load_model(golden / "tiny_llama")
    base = {**model.base, "extra": {"x": jnp.ones(3)}, "final_norm": {"scale": jnp.ones(47)}}
    del base["head"]
    with pytest.raises(ValueError, match="head/embedding is missing") as error:
        save_hf(tmp_path / "out", model.config, base, "llama")
    assert "final_norm/scale has shape [47], expected [48]" in str(error.value)
    assert "extra/x is unknown" in str(error.value)
    assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match="unknown family 'gpt9'"):
        save_hf(tmp_path / "out", model.config, model.base, "gpt9")


def test_a_failed_write_leaves_the_old_file(golden, tmp_path):
    path = shutil.copy(golden / "tiny_llama" / "model.safetensors", tmp_path / "model.safetensors")
    before = path.read_bytes()

    def fail():
        raise RuntimeError("the disk is full")

    with pytest.raises(RuntimeError, match="disk"):
        write_safetensors(path, [ToWrite("a", (2,), np.dtype(np.float32), fail)], {})
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]
    with pytest.raises(ValueError, match="complex64"):
        write_safetensors(path, [ToWrite("a", (2,), np.dtype(np.complex64), fail)], {})
