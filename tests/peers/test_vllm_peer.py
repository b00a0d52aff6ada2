"""vLLM computes what jaxsteer does with static folders, and with adapters over steerable bases mixed in one batch."""

from dataclasses import replace

import jax
import numpy as np
import pytest
from asked import logits, tokens_for
from tiny import random_steering
from vllm_folders import ask_vllm, written

from jaxsteer.io import load_model
from jaxsteer.io.formats import FORMATS, WriteOptions
from jaxsteer.io.load import LoadedModel
from jaxsteer.io.steered import SteeredModel
from jaxsteer.models.families import FAMILIES as TABLE
from jaxsteer.models.transformer import init_base
from jaxsteer.plans import parse_plan

pytestmark = pytest.mark.slow

FAMILIES = ("llama", "mistral", "smollm3", "qwen2", "qwen3", "gemma2", "gemma3", "olmo2", "phi3")
BLOCK = ("nonlinear(rank=3, alpha=0.7, activation=gelu) @ block layers=0,2",)
JOINT = (
    "nonlinear(rank=4, alpha=2.0, activation=gelu) @ block layers=0 name=a",
    "nonlinear(rank=2, alpha=0.3, activation=gelu) @ block layers=1-2 name=b",
    "lora(rank=2, alpha=3.0) @ attn.q,attn.v,mlp.gate,mlp.down",
    "rslora(rank=3) @ attn.o layers=1",
    "pissa(rank=2) @ attn.k layers=0,2",
    "linear(rank=2, alpha=0.5) @ mlp.in layers=2",
)
BLOCK_SMOLLM2 = ("nonlinear(rank=8, alpha=0.7) @ block",)
JOINT_SMOLLM2 = ("nonlinear(rank=8) @ block layers=last:20", "lora(rank=4, alpha=8.0) @ attn.q,mlp.down")
NEW = 6


def tiny(golden, family):
    """A tiny model of a family with heads as wide as vLLM's CPU kernels want them."""
    stored = load_model(golden / ("tiny_llama" if family == "llama" else f"families/{family}"))
    config = replace(stored.config, width=64, heads=2, kv_heads=1, head_dim=32)
    base = jax.jit(init_base, static_argnums=0)(config, jax.random.key(3))
    base |= {name: {"embedding": base[name]["embedding"] * 10} for name in ("embed", "head") if name in base}
    return LoadedModel(config, base, None, family, "", stored.family, ())


def steered(loaded, texts, seed, scale=0.2):
    plan = parse_plan(texts, loaded.config)
    return SteeredModel(loaded, plan, random_steering(plan, loaded.config, seed, scale))


@pytest.fixture(scope="module")
def answers(golden, tmp_path_factory):
    """For each family: what vLLM says of a static folder, and of a batch of two adapters and the base."""
    requests, expected = [], {}
    for family in FAMILIES:
        folder, loaded = tmp_path_factory.mktemp(family), tiny(golden, family)
        block, joint = steered(loaded, BLOCK, 1), steered(loaded, JOINT, 2)
        base = written(joint, "hf-steerable", folder / "base")
        adapters = [
            written(model, "vllm", folder / name, folder / "base") for name, model in (("b", block), ("j", joint))
        ]
        tokens = tokens_for(loaded.config, rows=3)
        both = {"tokens": tokens, "generate": NEW}
        requests += [
            {"path": written(block, "hf-steered", folder / "static"), "out": str(folder / "static.npy"), **both},
            {"base": base, "adapters": [adapters[1], None, adapters[0]], "out": str(folder / "mixed.npy"), **both},
        ]
        expected[family] = folder, tokens, (block,) * 3, (joint, SteeredModel(loaded), block)
    found = iter(ask_vllm(requests))
    return {family: (*case, next(found), next(found)) for family, case in expected.items()}


@pytest.mark.parametrize("family", FAMILIES)
def test_families(answers, family):
    folder, tokens, static, mixed, *said = answers[family]
    for name, models, answer in zip(("static", "mixed"), (static, mixed), said, strict=True):
        assert "error" not in answer, answer["error"]
        got = np.load(folder / f"{name}.npy")
        for row, model in enumerate(models):
            new = answer["generated"][row]
            ours = logits(model, [tokens[row] + new])[0]
            error = np.abs(got[row] - jax.nn.log_softmax(ours)[: len(tokens[row])]).max()
            print(f"{family} {name} row {row}: {error:.1e}")
            assert error <= 5e-5
            assert ours[len(tokens[row]) - 1 : -1].argmax(-1).tolist() == new
    plain = jax.nn.log_softmax(logits(mixed[1], [tokens[0]])[0])
    assert np.abs(np.load(folder / "mixed.npy")[0] - plain).max() > 0.1  # or the comparison says nothing


def test_smollm2(smollm2, tmp_path):
    """The model's activations of up to 25,000 leave fp32 with rounding of 5e-5 to 1e-4, in its base model too."""
    models = [steered(smollm2, texts, seed, 0.02) for seed, texts in enumerate((BLOCK_SMOLLM2, JOINT_SMOLLM2))]
    base = written(models[1], "hf-steerable", tmp_path / "base")
    folders = [written(model, "vllm", tmp_path / str(i), tmp_path / "base") for i, model in enumerate(models)]
    static = written(models[0], "hf-steered", tmp_path / "static")
    text = "Steering that lives in one framework is of little use to those who serve with another."
    tokens = [smollm2.require_tokenizer().encode(text, add_special_tokens=False)[:16]]
    out = {name: str(tmp_path / f"{name}.npy") for name in ("mixed", "static")}
    answers = ask_vllm(
        [
            {"base": base, "adapters": [None, *folders], "tokens": tokens * 3, "out": out["mixed"]},
            {"path": static, "tokens": tokens, "out": out["static"]},
        ]
    )
    assert not [answer for answer in answers if "error" in answer]
    got = [*np.load(out["mixed"]), *np.load(out["static"])]
    everyone = [SteeredModel(smollm2), *models, models[0]]
    ours = [np.asarray(jax.nn.log_softmax(logits(model, tokens)[0])) for model in everyone]
    errors = [np.abs(a - b) for a, b in zip(got, ours, strict=True)]
    print("SmolLM2: largest", [f"{error.max():.1e}" for error in errors], "mean", [f"{e.mean():.1e}" for e in errors])
    assert all(error.mean() <= 5e-5 for error in errors)
    assert all(error.max() <= errors[0].max() + 5e-5 for error in errors[1:])
    assert all(np.abs(one - ours[0]).max() > 0.1 for one in ours[1:])


def test_gpt2_is_what_vllm_cannot_load(golden, tmp_path):
    loaded = load_model(golden / "families" / "gpt2")
    model = steered(loaded, BLOCK, 1)
    folder = written(model, "hf-steered", tmp_path / "static")
    (answer,) = ask_vllm([{"path": folder, "tokens": tokens_for(loaded.config)}])
    assert answer["error"]
    options = WriteOptions(over=tmp_path / "static")
    assert any(
        "GPT-2" in reason
        for reason in FORMATS["vllm"].refuse(model.plan, TABLE[model.loaded.family], loaded.config, options)
    )
