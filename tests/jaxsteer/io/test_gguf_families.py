"""Every family as llama.cpp's converter writes it, against its Hugging Face folder."""

from pathlib import Path

import numpy as np
import pytest
from published import KEYS
from safetensors.numpy import load_file, save_file
from tiny import close, identical, run

from jaxsteer import Model, make_batch
from jaxsteer.io import load_base, load_config, load_model, save_hf
from jaxsteer.io.gguf_config import config_from_gguf
from jaxsteer.io.gguf_file import Gguf, open_gguf
from jaxsteer.io.stored import Stored
from jaxsteer.models.config import RopeScaling
from jaxsteer.models.families import FAMILIES
from jaxsteer.models.transformer import logits_of, output_embedding


def logits(model):
    ids = np.random.default_rng(0).integers(3, model.config.vocab_size, (2, 24))
    hidden = run(Model(model.config), model.base, {}, make_batch(ids)).hidden
    return logits_of(hidden, output_embedding(model.base), model.config.final_softcap)


@pytest.mark.parametrize("family", FAMILIES)
def test_same_model_as_the_folder(family_files, family, tmp_path):
    folder, file = family_files(family)
    theirs, ours = load_model(folder), load_model(file)
    assert ours.config == theirs.config
    assert ours.family == family
    close(logits(ours), logits(theirs), 1e-5)
    save_hf(tmp_path / "out", ours.config, ours.base, ours.family)
    again = load_model(tmp_path / "out")
    assert again.config == ours.config
    identical(again.base, ours.base)


def described(arch, vocab=64, width=32, tensors=(), **keys):
    """The header of a GGUF file, without a file."""
    said = {
        "block_count": 12,
        "attention.head_count": 4,
        "feed_forward_length": 48,
        "attention.layer_norm_rms_epsilon": 1e-6,
        "context_length": 8192,
        **{key.replace("__", "."): value for key, value in keys.items()},
    }
    metadata = {"general.architecture": arch} | {f"{arch}.{key}": value for key, value in said.items()}
    shapes = {"token_embd.weight": (vocab, width)} | dict.fromkeys(tensors, (4,))
    stored = {name: Stored(shape, 0, lambda index=(): np.ones(4)) for name, shape in shapes.items()}
    return Gguf(Path("x.gguf"), metadata, stored)


def test_a_head_that_repeats_the_embedding_is_tied(family_files, write_gguf):
    """As GPT-2's old converter wrote it."""
    folder, file = family_files("gpt2")
    tensors = load_file(folder / "model.safetensors")
    save_file(tensors | {"lm_head.weight": tensors["transformer.wte.weight"]}, folder / "model.safetensors")
    again = write_gguf(folder, load_config(folder), arch="gpt2", name="again.gguf", **KEYS["gpt2"])
    assert "output.weight" in open_gguf(again).tensors
    assert load_config(again) == load_config(file)
    identical(load_base(again), load_base(file))
    save_file(tensors | {"lm_head.weight": tensors["transformer.wte.weight"] + 1}, folder / "model.safetensors")
    other = write_gguf(folder, load_config(file), arch="gpt2", name="other.gguf", **KEYS["gpt2"])
    assert not load_config(other).tied_head


PERIOD_6 = (True,) * 5 + (False,)


@pytest.mark.parametrize(
    ("arch", "keys", "expected"),
    [
        ("llama", {}, {"window": None}),
        ("llama", {"attention__sliding_window": 4096}, {"window": 4096, "local_layers": ()}),
        ("llama", {"attention__sliding_window": 0}, {"window": None}),
        (
            "gemma2",
            {},
            {"window": 4096, "local_layers": (True, False) * 6, "attn_softcap": 50.0, "final_softcap": 30.0},
        ),
        ("gemma2", {"attn_logit_softcapping": 0.0}, {"attn_softcap": None}),
        ("gemma2", {"attention__sliding_window_pattern": 1}, {"window": None}),
        ("gemma2", {"attention__key_length": 16}, {"query_scale": 16**-0.5}),
        ("gemma2", {"attention__key_length": 16, "block_count": 46}, {"query_scale": 8**-0.5}),
        ("gemma2", {"attention__scale": 0.25, "block_count": 46}, {"query_scale": 0.25}),
        ("gemma3", {"attention__sliding_window": 512}, {"local_layers": PERIOD_6 * 2, "local_rope_theta": 1e4}),
        ("gemma3", {"attention__sliding_window": 512, "rope__freq_base_swa": 2e4}, {"local_rope_theta": 2e4}),
        ("gemma3", {"attention__sliding_window": 512, "attention__sliding_window_pattern": 0}, {"local_layers": ()}),
        ("gemma3", {"attention__sliding_window": 512, "final_logit_softcapping": 30.0}, {"final_softcap": 30.0}),
        ("gemma3", {"attention__sliding_window": 0}, {"window": None, "local_rope_theta": None, "final_softcap": None}),
        ("smollm3", {}, {"unrotated_layers": (False, False, False, True) * 3}),
        ("phi3", {"attention__sliding_window": 2047}, {"window": 2047, "local_layers": ()}),
        ("olmo2", {"attention__sliding_window": 0}, {"window": None}),
        ("llama", {"rope__scaling__factor": 2.5}, {"rope_scaling": RopeScaling("linear", 2.5)}),
        ("llama", {"rope__scale_linear": 2.5}, {"rope_scaling": RopeScaling("linear", 2.5)}),
        ("llama", {"rope__scale_linear": 4.0, "rope__scaling__factor": 1.0}, {"rope_scaling": None}),
        ("llama", {"rope__scaling__type": "linear", "rope__scaling__factor": 0.0}, {"rope_scaling": None}),
        ("llama", {"rope__scaling__type": "linear"}, {"rope_scaling": None}),
        ("llama", {"rope__scaling__type": "none", "rope__scaling__factor": 2.5}, {"rope_scaling": None}),
        ("llama", {"tensor_data_layout": "Meta AI original pth"}, {"rope_theta": 1e4, "kv_heads": 4}),
        ("llama", {"attention__head_count_kv": [2] * 12}, {"kv_heads": 2}),
        ("gemma2", {"rope__freq_base": 2e4, "rope__freq_base_swa": 2e4}, {"rope_theta": 2e4, "local_rope_theta": None}),
    ],
)
def test_keys_and_llama_cpps_defaults(arch, keys, expected):
    family, config = config_from_gguf(described(arch, **keys))
    assert {name: getattr(config, name) for name in expected} == expected
    assert family.name == ("mistral" if arch == "llama" and config.window else arch)


@pytest.mark.parametrize(
    ("arch", "keys", "words"),
    [
        ("gemma3", {}, ["gemma3.attention.sliding_window", "missing"]),
        ("gemma2", {"attention__sliding_window_pattern": [True]}, ["1 flags", "12 layers"]),
        ("gemma2", {"attention__sliding_window_pattern": "every"}, ["sliding_window_pattern", "'every'", "period"]),
        ("gemma2", {"block_count": 1 << 40}, [str(1 << 40), "layers"]),
        ("smollm3", {"block_count": 1 << 40}, [str(1 << 40), "layers"]),
        (
            "smollm3",
            {"attention__sliding_window": 8},
            ["smollm3.attention.sliding_window is 8", "not supported"],
        ),
        (
            "olmo2",
            {"attention__sliding_window": 4096},
            ["olmo2.attention.sliding_window is 4096", "not supported"],
        ),
        (
            "qwen3",
            {"attention__sliding_window": 8, "expert_count": 4},
            ["sliding_window is 8", "expert_count is 4"],
        ),
        ("phi3", {"rope__dimension_count": 6}, ["rope.dimension_count is 6", "only 8"]),
        ("phi3", {"tensors": ("rope_factors_long.weight", "rope_factors_short.weight")}, ["longrope", "linear"]),
        ("gemma2", {"rope__freq_base_swa": 2e4}, ["gemma2.rope.freq_base_swa is 20000.0", "only 10000.0"]),
        ("phi3", {"rope__scaling__type": "longrope"}, ["longrope", "linear", "llama3"]),
        ("phi3", {"rope__scaling__attn_factor": 1.19}, ["attn_factor", "1.19"]),
        ("llama", {"rope__scaling__type": "yarn", "rope__scaling__factor": 4.0}, ["'yarn'", "linear", "llama3"]),
        ("qwen3", {"rope__scaling__yarn_beta_fast": 32.0}, ["yarn_beta_fast is 32.0"]),
        (
            "mistral3",
            {},
            ["'mistral3'", "llama, smollm3, qwen2, qwen3, gemma2, gemma3, olmo2, phi3, gpt2"],
        ),
        ("gpt2", {"rope__freq_base": 1e4, "attention__layer_norm_epsilon": 1e-5}, ["gpt2.rope.freq_base is 10000.0"]),
    ],
)
def test_what_no_family_follows_is_refused_by_name(arch, keys, words):
    with pytest.raises(ValueError, match=r"x\.gguf: ") as error:
        config_from_gguf(described(arch, **keys))
    assert all(word in str(error.value) for word in words), error.value
