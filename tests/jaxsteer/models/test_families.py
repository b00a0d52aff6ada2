import json
from pathlib import Path

import numpy as np
import pytest

from jaxsteer.models.config import ModelConfig, RopeScaling
from jaxsteer.models.families import LLAMA, config_from_hf, config_to_hf
from jaxsteer.models.families.table import ROTARY

GOLDEN = Path(__file__).resolve().parents[2] / "golden"
DIMS = {
    "model_type": "llama",
    "vocab_size": 128256,
    "hidden_size": 2048,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "intermediate_size": 8192,
}


def read(**fields):
    return config_from_hf(DIMS | fields, "config.json")[1]


def test_defaults_are_those_of_transformers():
    expected = ModelConfig(
        vocab_size=128256,
        width=2048,
        layers=16,
        heads=32,
        kv_heads=32,
        head_dim=64,
        mlp_width=8192,
        norm_eps=1e-6,
    )
    assert read() == expected
    assert read(num_key_value_heads=None, head_dim=None) == expected


def test_features_are_read():
    config = read(num_key_value_heads=8, head_dim=128, tie_word_embeddings=True, attention_bias=True, mlp_bias=True)
    assert (config.kv_heads, config.head_dim) == (8, 128)
    assert (config.tied_head, config.attn_bias, config.mlp_bias) == (True, True, True)


LLAMA3 = {
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


@pytest.mark.parametrize(
    ("fields", "theta", "scaling"),
    [
        ({"rope_theta": 5e5}, 5e5, None),
        ({"rope_theta": 10000, "rope_scaling": None}, 1e4, None),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}, 5e5, None),
        ({"rope_scaling": {"type": "linear", "factor": 2}}, 1e4, RopeScaling("linear", 2.0)),
        (
            {"rope_theta": 5e5, "rope_scaling": {"rope_type": "llama3", **LLAMA3}},
            5e5,
            RopeScaling("llama3", 32.0, 1.0, 4.0, 8192),
        ),
        (
            {"rope_parameters": {"rope_theta": 5e5, "rope_type": "llama3", **LLAMA3}},
            5e5,
            RopeScaling("llama3", 32.0, 1.0, 4.0, 8192),
        ),
    ],
)
def test_rope_is_read_from_old_and_new_fields(fields, theta, scaling):
    config = read(**fields)
    assert (config.rope_theta, config.rope_scaling) == (theta, scaling)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, ["rope_type", "yarn", "linear"]),
        ({"rope_scaling": {"type": "dynamic", "factor": 4.0}}, ["rope_type", "dynamic"]),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, ["low_freq_factor"]),
        ({"rope_scaling": {"type": "linear", "factor": -1.0}}, ["factor", "-1.0"]),
        ({"rope_theta": 1e4, "rope_parameters": {"rope_theta": 5e5}}, ["rope_theta", "keep one"]),
        ({"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}}, ["partial_rotary_factor"]),
        ({"rope_scaling": "linear"}, ["'linear'", "object"]),
        ({"hidden_act": "gelu"}, ["hidden_act", "gelu", "silu"]),
        ({"sliding_window": 1024}, ["sliding_window", "1024", "not known"]),
        ({"quantization_config": {"bits": 4}}, ["quantization_config", "bits"]),
        ({"hidden_size": None}, ["hidden_size", "missing"]),
        ({"hidden_size": "2048"}, ["hidden_size", "'2048'", "int"]),
        ({"rms_norm_eps": float("nan")}, ["rms_norm_eps", "nan"]),
        ({"tie_word_embeddings": 1}, ["tie_word_embeddings", "bool"]),
        ({"num_key_value_heads": 5}, ["kv_heads"]),
        ({"model_type": "mamba"}, ["model_type", "mamba", "llama"]),
    ],
)
def test_what_cannot_be_followed_is_refused_by_name(fields, words):
    with pytest.raises(ValueError) as error:  # noqa: PT011  (the words are checked below)
        read(**fields)
    assert all(word in str(error.value) for word in words), error.value


def test_fields_without_effect_are_passed_over():
    assert read(use_cache=False, torch_dtype="bfloat16", pretraining_tp=2, sliding_window=None) == read()


@pytest.mark.parametrize("name", ["tiny_llama", "tiny_llama_mha", "tiny_llama_rope"])
def test_config_survives_export(name):
    raw = json.loads((GOLDEN / name / "config.json").read_text())
    family, config = config_from_hf(raw, name)
    assert config_from_hf(config_to_hf(family, config), name) == (family, config)


def test_exported_config_is_what_transformers_reads():
    transformers = pytest.importorskip("transformers")
    scaling = RopeScaling("llama3", 8.0, 1.0, 4.0, 4096)
    config = ModelConfig(97, 48, 3, 4, 2, 16, 80, 1e-5, 5e5, scaling, True, True, True, 512)
    theirs = transformers.LlamaConfig(**config_to_hf(LLAMA, config))
    assert theirs.rope_parameters["rope_theta"] == 5e5
    assert theirs.rope_parameters["factor"] == 8.0
    assert config_from_hf(theirs.to_dict(), "theirs")[1] == config


@pytest.mark.parametrize("rows", [48, 24])
def test_rotary_order_is_undone_and_redone(rows):
    config = ModelConfig(97, 48, 3, 4, 2, 12, 80)
    kernel = np.random.default_rng(0).normal(size=(rows, 48))
    np.testing.assert_array_equal(ROTARY.write(ROTARY.read(kernel, config), config), kernel)
    # llama.cpp's rows 0, 1, 2 of a head of 12 are ours 0, 6, 1.
    ours = ROTARY.read(kernel, config)
    np.testing.assert_array_equal(ours[:, [0, 6, 1]], kernel[:3].T)


def test_every_parameter_has_a_name_of_its_own():
    for layout in ("path", "hf", "gguf"):
        names = [getattr(row, layout) for row in LLAMA.rows]
        assert len(set(names)) == len(names)
