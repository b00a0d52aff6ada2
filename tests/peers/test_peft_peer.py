"""What is exported for peft, computed by peft itself: as an adapter and merged, in every family."""

import json

import numpy as np
import pytest
from asked import ask, greedy, logits, tokens_for
from tiny import random_steering

from jaxsteer.io import load_model
from jaxsteer.io.formats import Given, WriteOptions, peft
from jaxsteer.io.steered import SteeredModel
from jaxsteer.models.families import FAMILIES
from jaxsteer.plans import parse_plan

pytestmark = pytest.mark.slow

PLANS = {
    "lora": ("lora(rank=3, alpha=7) @ projections", "lora(rank=2, alpha=0.3) @ attn.o layers=1 name=b"),
    "rslora": ("rslora(rank=3, alpha=7) @ attn.q,attn.v,mlp.down layers=0,2",),
    "dora": ("dora(rank=2, alpha=3) @ projections",),
    "dora and lora": ("dora(rank=2) @ attn.k,mlp.up layers=0,1", "lora(rank=3, alpha=1) @ attn.q,mlp.down name=b"),
    "pissa": ("pissa(rank=2, alpha=3) @ projections",),
    "affine": ("linear(rank=2, alpha=0.5) @ mlp.in", "lora @ attn.q name=b"),
    "affine behind": ("linear(rank=2) @ mlp,attn", "linear(rank=3) @ mlp.in name=b", "lora @ mlp.down name=c"),
}
CASES = [(family, ("lora", "dora")[i % 2]) for i, family in enumerate(FAMILIES)] + [
    *(("llama", plan) for plan in PLANS if plan != "lora"),
    *((family, plan) for family in ("gpt2", "phi3") for plan in ("lora", "dora", "dora and lora", "pissa", "affine")),
    ("gemma2", "affine"),
]


@pytest.mark.parametrize(("family", "name"), sorted(set(CASES)))
def test_peft_computes_what_we_compute(golden, tmp_path, family, name):
    path = golden / ("tiny_llama" if family == "llama" else f"families/{family}")
    loaded = load_model(path)
    plan = parse_plan(PLANS[name], loaded.config)
    steered = SteeredModel(loaded, plan, random_steering(plan, loaded.config, scale=0.2))
    assert peft.refuse(plan, FAMILIES[family], loaded.config, WriteOptions()) == []
    export = tmp_path / "export"
    export.mkdir()
    peft.write(peft.reduce(steered, WriteOptions()), export, WriteOptions())
    tokens, merged = tokens_for(loaded.config), tmp_path / "merged.npy"
    request = {"path": str(export), "base": str(path), "tokens": tokens, "generate": 4, "merged_out": str(merged)}
    answer, theirs = ask("hf", "peft_peer", request, tmp_path)
    ours, plain = logits(steered, tokens), logits(SteeredModel(loaded), tokens)
    errors = {
        "peft": abs(theirs - ours).max(),
        "merged": abs(np.load(merged) - ours).max(),
        "read back": abs(logits(peft.read(export, loaded, Given()), tokens) - ours).max(),
        "moved": abs(plain - ours).max(),
    }
    print(family, name, {key: f"{value:.1e}" for key, value in errors.items()}, json.dumps(answer["versions"]))
    assert errors["moved"] > 0.02
    assert max(errors["peft"], errors["merged"], errors["read back"]) <= 1e-5
    assert answer["generated"] == greedy(steered, tokens, 4)
