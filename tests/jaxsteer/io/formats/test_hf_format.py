"""The merged folder: what is computed stays, what cannot be merged is refused with what can hold it."""

from dataclasses import replace

import jax
import numpy as np
import pytest
from exported import family_model, logits, read_again, refusals, steered_of, written
from tiny import identical

from jaxsteer.io import SteeredModel, WriteOptions, load_model
from jaxsteer.io.formats import FORMATS
from jaxsteer.models.quantise import quantise

HF = FORMATS["hf"]

TOKENS = np.random.default_rng(0).integers(3, 61, (2, 10)).astype(np.int32)


@pytest.mark.parametrize(
    "family", ["llama", *(pytest.param(family, marks=pytest.mark.slow) for family in ("gpt2", "phi3"))]
)
def test_the_merged_model_computes_what_the_steered_one_does(golden, tmp_path, family):
    whole = steered_of(family_model(golden, family), "lora(rank=2) @ attn.q,mlp.down", "linear(rank=2) @ mlp.in")
    reduced = written(HF, whole, tmp_path)
    assert HF.recognises(tmp_path)
    read = read_again(HF, tmp_path)
    assert read.plan == ()
    identical(read.base, reduced.base)
    want = logits(whole, TOKENS)
    assert np.abs(want - logits(SteeredModel(whole.loaded), TOKENS)).max() > 0.1
    np.testing.assert_allclose(logits(read, TOKENS), want, atol=1e-5, rtol=0)


def test_a_vector_becomes_a_bias_that_the_family_stores(golden, tmp_path):
    whole = steered_of(family_model(golden, "llama"), "fixed @ block")
    written(HF, whole, tmp_path)
    read = read_again(HF, tmp_path)
    assert read.loaded.config.mlp_bias
    np.testing.assert_allclose(logits(read, TOKENS), logits(whole, TOKENS), atol=1e-5, rtol=0)


@pytest.mark.parametrize("dtype", ["bfloat16", pytest.param("float16", marks=pytest.mark.slow)])
def test_weights_are_rounded_once(golden, tmp_path, dtype):
    whole = steered_of(family_model(golden, "llama"), "lora(rank=2) @ mlp.down")
    exact = HF.reduce(whole, WriteOptions())
    written(HF, whole, tmp_path, dtype=dtype)
    rounded = jax.tree.map(lambda leaf: np.asarray(leaf.astype(dtype), np.float32), exact.base)
    identical(jax.tree.map(np.asarray, load_model(tmp_path).base), rounded)


def test_what_cannot_be_merged_is_refused(golden):
    llama, gemma = family_model(golden, "llama"), family_model(golden, "gemma2")
    (reason,) = refusals(HF, llama, "nonlinear @ block name=after", "lora @ attn.q")
    assert reason.startswith("slot 'after' (nonlinear @ block)")
    assert reason.endswith("--to hf-steered")
    (reason,) = refusals(HF, llama, "lora @ attn.q positions=prompt")
    assert "positions prompt" in reason
    assert reason.endswith("Use jaxsteer itself")
    (reason,) = refusals(HF, gemma, "fixed @ mlp.in")
    assert "bias of mlp.gate" in reason or "bias of mlp.up" in reason
    assert "gemma2 models have none" in reason
    (reason,) = refusals(HF, gemma, "linear @ mlp")
    assert "a norm lies between" in reason
    reasons = refusals(HF, llama, "dora @ attn.q", "lora @ attn.q", "lora @ attn.o name=other")
    assert [reason.split(":")[0] for reason in reasons] == ["slot 'dora' (dora)", "slot 'lora' (lora)"]
    assert not refusals(HF, llama, "dora @ attn.q", "lora @ attn.k")


def test_another_dtype_is_refused(golden):
    llama = family_model(golden, "llama")
    (reason,) = refusals(HF, llama, "lora @ attn.q", dtype="Q8_0")
    assert reason.startswith("--dtype Q8_0")


def test_an_int8_base_is_refused(golden):
    loaded = family_model(golden, "llama")
    whole = steered_of(replace(loaded, base=quantise(loaded.base)), "lora @ attn.q")
    with pytest.raises(ValueError, match="int8"):
        HF.reduce(whole, WriteOptions())
