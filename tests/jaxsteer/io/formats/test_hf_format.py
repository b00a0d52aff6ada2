"""The merged folder: what is computed stays, what cannot be merged is refused with what can hold it."""

import jax
import numpy as np
import pytest
from tiny import fast_jit, identical, random_steering

from jaxsteer import make_batch, parse_plan
from jaxsteer.io import SteeredModel, WriteOptions, load_model
from jaxsteer.io.formats import FORMATS
from jaxsteer.io.formats.format import Given
from jaxsteer.models.families import FAMILIES
from jaxsteer.models.quantise import quantise
from jaxsteer.models.transformer import forward, logits_of, output_embedding

HF = FORMATS["hf"]

TOKENS = np.random.default_rng(0).integers(3, 61, (2, 10)).astype(np.int32)
run = fast_jit(forward, static_argnums=0)


def family_model(golden, family):
    return load_model(golden / ("tiny_llama" if family == "llama" else f"families/{family}"))


def steered(loaded, *texts):
    plan = parse_plan(texts, loaded.config)
    return SteeredModel(loaded, plan, random_steering(plan, loaded.config))


def logits(model):
    hidden = run(model.model, model.base, model.steering, make_batch(TOKENS)).hidden
    return np.asarray(logits_of(hidden, output_embedding(model.base), model.loaded.config.final_softcap))


def refusals(format, loaded, *texts, **options):
    plan = parse_plan(texts, loaded.config)
    return format.refuse(plan, FAMILIES[loaded.family], loaded.config, WriteOptions(**options))


@pytest.mark.parametrize("family", ["llama", "phi3", "gpt2"])
def test_the_merged_model_computes_what_the_steered_one_does(golden, tmp_path, family):
    whole = steered(family_model(golden, family), "lora(rank=2) @ attn.q,mlp.down", "linear(rank=2) @ mlp.in")
    assert not HF.refuse(whole.plan, FAMILIES[family], whole.loaded.config, WriteOptions())
    reduced = HF.reduce(whole, WriteOptions())
    HF.write(reduced, tmp_path, WriteOptions())
    assert HF.recognises(tmp_path)
    read = HF.read(tmp_path, None, Given())
    assert read.plan == ()
    identical(read.base, reduced.base)
    want = logits(whole)
    assert np.abs(want - logits(SteeredModel(whole.loaded))).max() > 0.1
    np.testing.assert_allclose(logits(read), want, atol=1e-5, rtol=0)


def test_a_vector_becomes_a_bias_that_the_family_stores(golden, tmp_path):
    whole = steered(family_model(golden, "llama"), "fixed @ block")
    HF.write(HF.reduce(whole, WriteOptions()), tmp_path, WriteOptions())
    read = HF.read(tmp_path, None, Given())
    assert read.loaded.config.mlp_bias
    np.testing.assert_allclose(logits(read), logits(whole), atol=1e-5, rtol=0)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_weights_are_rounded_once(golden, tmp_path, dtype):
    whole = steered(family_model(golden, "llama"), "lora(rank=2) @ mlp.down")
    exact = HF.reduce(whole, WriteOptions())
    HF.write(HF.reduce(whole, WriteOptions(dtype=dtype)), tmp_path, WriteOptions(dtype=dtype))
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
    whole = steered(loaded, "lora @ attn.q")
    int8 = SteeredModel(loaded.__class__(**{**vars(loaded), "base": quantise(loaded.base)}), whole.plan, whole.steering)
    with pytest.raises(ValueError, match="int8"):
        HF.reduce(int8, WriteOptions())
