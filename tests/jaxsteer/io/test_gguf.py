import math
import struct

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gguf import GGMLQuantizationType
from gguf.quants import dequantize, quantize

from jaxsteer.io import load_base, load_config, load_model
from jaxsteer.io.gguf_config import scaling_from_factors
from jaxsteer.io.gguf_file import open_gguf
from jaxsteer.models.config import RopeScaling


def llama3_factors(config, scaling):
    """Divisors of the rotary frequencies, as llama.cpp's converter writes them."""
    factors = []
    for i in range(0, config.head_dim, 2):
        wavelength = 2 * math.pi * config.rope_theta ** (i / config.head_dim)
        low, high = (
            scaling.original_length / scaling.low_factor,
            scaling.original_length / scaling.high_factor,
        )
        if wavelength < high:
            factors.append(1.0)
        elif wavelength > low:
            factors.append(scaling.factor)
        else:
            smooth = scaling.original_length / wavelength - scaling.low_factor
            smooth /= scaling.high_factor - scaling.low_factor
            factors.append(1 / ((1 - smooth) / scaling.factor + smooth))
    return factors


@pytest.mark.parametrize("name", ["tiny_llama", "tiny_llama_mha", "tiny_llama_rope"])
def test_same_model_as_the_folder(golden, write_gguf, name):
    folder = golden / name
    config = load_config(folder)
    factors = llama3_factors(config, config.rope_scaling) if config.rope_scaling else None
    path = write_gguf(folder, config, factors=factors)
    model = load_model(path)
    assert model.config == config
    jax.tree.map(np.testing.assert_array_equal, model.base, load_base(folder))
    assert (model.name, model.family, model.stop_tokens) == ("tiny", "llama", (0,))
    assert model.tokenizer.encode("ab1<eos>") == [8, 5, 0]


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "BF16", "F16"])
def test_quantised_weights(golden, write_gguf, tmp_path, kind):
    # Blocks of 32 need widths that 32 divides.
    from jaxsteer.io import save_hf
    from jaxsteer.models.config import ModelConfig
    from jaxsteer.models.transformer import init_base

    config = ModelConfig(64, 64, 2, 4, 2, 16, 96, tied_head=True)
    base = init_base(config, jax.random.key(0))
    save_hf(tmp_path / "hf", config, base, "llama")
    loaded = load_base(write_gguf(tmp_path / "hf", config, kind))
    theirs = np.asarray(base["blocks"]["mlp"]["down"]["kernel"][1]).T
    target = GGMLQuantizationType[kind]
    expected = dequantize(quantize(np.ascontiguousarray(theirs), target), target).T
    np.testing.assert_array_equal(loaded["blocks"]["mlp"]["down"]["kernel"][1], expected)
    # Rows are quantised one by one, so the rotary order survives quantisation.
    error = jax.tree.map(lambda a, b: jnp.abs(a - b).max() / jnp.abs(b).max(), loaded, base)
    assert max(map(float, jax.tree.leaves(error))) < {"Q4_0": 0.13, "Q4_1": 0.13}.get(kind, 0.07)


def available_kinds():
    from gguf.quants import _type_traits  # which block formats the package implements

    return sorted(kind.name for kind in _type_traits)


@pytest.mark.parametrize("kind", available_kinds())
def test_every_block_format_of_the_package(tmp_path, kind):
    target = GGMLQuantizationType[kind]
    block, width = gguf.GGML_QUANT_SIZES[target]
    rng = np.random.default_rng(0)
    raw = rng.integers(0, 256, (3, 2 * width), dtype=np.uint8)
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "llama")
    writer.add_tensor("before", np.ones(3, np.float32))
    writer.add_tensor("x", raw, raw_dtype=target)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    found = open_gguf(tmp_path / "x.gguf").tensors["x"]
    assert found.shape == (3, 2 * block)
    with np.errstate(all="ignore"):
        np.testing.assert_array_equal(found.read(), dequantize(raw, target))


def test_header_agrees_with_the_packages_reader(golden, write_gguf):
    path = write_gguf(golden / "tiny_llama", load_config(golden / "tiny_llama"))
    reader, ours = gguf.GGUFReader(path), open_gguf(path)
    fields = {k: f.contents() for k, f in reader.fields.items() if not k.startswith("GGUF.")}
    assert set(fields) == set(ours.metadata)
    for key, value in fields.items():
        assert ours.metadata[key] == value, key
    for tensor in reader.tensors:
        assert ours.tensors[tensor.name].shape == tuple(tensor.shape.tolist())[::-1]
        np.testing.assert_array_equal(ours.tensors[tensor.name].read(), tensor.data)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"expert_count": 8}, ["llama.expert_count", "8"]),
        ({"attention__sliding_window": -1.5}, ["llama.attention.sliding_window", "-1.5"]),
        ({"something_new": 1.5}, ["llama.something_new", "1.5"]),
        ({"rope__dimension_count": 6}, ["rope.dimension_count", "6", "12"]),
        ({"block_count": None}, ["llama.block_count", "missing"]),
        ({"block_count": 10**9}, ["missing: ", "blk.3.attn_norm.weight"]),
        ({"attention__head_count_kv": [2, 2, 1]}, ["head_count_kv", "[2, 2, 1]"]),
        ({"rope__scaling__type": "yarn", "rope__scaling__factor": 4.0}, ["rope.scaling.type", "yarn"]),
    ],
)
def test_what_cannot_be_followed_is_refused_by_name(golden, write_gguf, changes, words):
    path = write_gguf(golden / "tiny_llama", load_config(golden / "tiny_llama"), **changes)
    with pytest.raises(ValueError, match=r"tiny\.gguf") as error:
        load_base(path)
    assert all(word in str(error.value) for word in words), error.value


def test_linear_scaling(golden, write_gguf):
    config = load_config(golden / "tiny_llama")
    path = write_gguf(golden / "tiny_llama", config, rope__scaling__type="linear", rope__scaling__factor=2.5)
    assert load_config(path).rope_scaling == RopeScaling("linear", 2.5)


@pytest.mark.parametrize(
    "scaling",
    [
        RopeScaling("llama3", 8.0, 1.0, 4.0, 8192),
        RopeScaling("llama3", 32.0, 1.0, 4.0, 8192),
        RopeScaling("llama3", 4.0, 1.0, 8.0, 4096),
    ],
)
def test_llama3_scaling_is_recovered_from_its_factors(golden, scaling):
    import dataclasses

    config = dataclasses.replace(load_config(golden / "tiny_llama"), head_dim=128, rope_theta=500_000.0)
    factors = np.array(llama3_factors(config, scaling), np.float32)
    assert scaling_from_factors(factors.astype(np.float64), 500_000.0) == scaling


def test_other_factors_are_refused(golden, write_gguf):
    config = load_config(golden / "tiny_llama")
    with pytest.raises(ValueError, match=r"rope_freqs\.weight does not follow"):
        load_config(write_gguf(golden / "tiny_llama", config, factors=[1.0, 3.0, 2.0, 5.0, 1.0, 9.0]))
    with pytest.raises(ValueError, match=r"rope_freqs\.weight has shape \[4\]"):
        load_config(write_gguf(golden / "tiny_llama", config, factors=[1.0] * 4))
    unscaled = write_gguf(golden / "tiny_llama", config, factors=[1.0] * 6)
    assert load_config(unscaled).rope_scaling is None


def test_truncated_anywhere(golden, write_gguf):
    path = write_gguf(golden / "tiny_llama", load_config(golden / "tiny_llama"))
    whole = path.read_bytes()
    for keep in [*range(0, 2500, 37), len(whole) // 2, len(whole) - 64]:
        path.write_bytes(whole[:keep])
        with pytest.raises(ValueError, match=r"tiny\.gguf: not a complete GGUF file"):
            load_base(path)


@pytest.mark.parametrize(
    "content",
    [
        b"GGML" + bytes(60),
        b"GGUF" + struct.pack("<IQQ", 1, 0, 0),
        b"GGUF" + struct.pack(">IQQ", 3, 0, 0),
        b"GGUF" + struct.pack("<IQQ", 3, 1 << 60, 0),
        b"GGUF" + struct.pack("<IQQ", 3, 0, 1 << 60),
        b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 1 << 60) + bytes(64),
        b"GGUF" + struct.pack("<IQQQ1sIIQ", 3, 0, 1, 1, b"k", 9, 4, 1 << 60) + bytes(64),
        b"GGUF" + struct.pack("<IQQQ1sIIQ", 3, 0, 1, 1, b"k", 9, 8, 1 << 60) + bytes(64),
        b"GGUF" + struct.pack("<IQQQ1sI", 3, 0, 1, 1, b"k", 77) + bytes(64),
        b"GGUF" + struct.pack("<IQQQ1sIQQIQ", 3, 1, 0, 1, b"t", 2, 1 << 62, 1 << 62, 0, 0) + bytes(64),
        b"GGUF" + struct.pack("<IQQQ1sIQIQ", 3, 1, 0, 1, b"t", 1, 8, 999, 0) + bytes(64),
    ],
)
def test_headers_that_lie(tmp_path, content):
    path = tmp_path / "bad.gguf"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"bad\.gguf: not a complete GGUF file"):
        open_gguf(path)
