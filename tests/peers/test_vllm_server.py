"""One vLLM server with a steerable base serves three trained adapters, loaded while it runs, and the base at once."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from asked import ROOT, python_of
from vllm_folders import CLOSE, divergences, run_json, written

from jaxsteer.io.formats.convert import load
from jaxsteer.io.steered import SteeredModel
from train.data import ListOps
from train.tasks import ListOpsTask

pytestmark = pytest.mark.slow

PLANS = {
    "block": ["nonlinear(rank=8) @ block"],
    "lora": ["lora(rank=8, alpha=16) @ attn.q,attn.v,mlp.down"],
    "joint": ["lora(rank=4, alpha=8) @ attn.q,attn.o,mlp.gate", "nonlinear(rank=8) @ block"],
}
REQUESTS, CONCURRENT, NEW = 96, 32, 16


@pytest.fixture(scope="module")
def trained(smollm2, tmp_path_factory):
    """SmolLM2 with steering trained on ListOps, from the folder in JAXSTEER_ADAPTERS or for 40 steps here."""
    given = os.environ.get("JAXSTEER_ADAPTERS")
    folder = Path(given) if given else tmp_path_factory.mktemp("adapters")
    models = {"base": SteeredModel(smollm2)}
    for name, plan in PLANS.items():
        if not given:
            command = [sys.executable, "-m", "train.sft", "configs/listops_smollm2.py", "--steps", "40"]
            command += ["--test-examples", "16", "--validation-examples", "16", "--evaluate-every", "0"]
            subprocess.run([*command, "--plan", *plan, "--out", folder / name], cwd=ROOT, check=True)
        models[name] = load(folder / name / "steering.safetensors", smollm2)
    return models


def test_three_adapters_and_the_base_at_once(trained, tmp_path):
    base = written(trained["block"], "hf-steerable", tmp_path / "base")
    adapters = {name: written(trained[name], "vllm", tmp_path / name, tmp_path / "base") for name in PLANS}
    examples = ListOpsTask(ListOps(max_length=10)).load("test")[:REQUESTS]
    encode = trained["base"].loaded.require_tokenizer().encode
    names = [list(trained)[i % len(trained)] for i in range(REQUESTS)]
    prompts = [encode(example.turns[0].text, add_special_tokens=False) for example in examples]
    request = {
        "python": str(python_of("vllm")),
        "base": base,
        "adapters": adapters,
        "requests": [{"model": n, "tokens": p, "generate": NEW} for n, p in zip(names, prompts, strict=True)],
        "concurrent": CONCURRENT,
        "dtype": "float32",
        "log": str(tmp_path / "server.log"),
    }
    answer = run_json(sys.executable, "vllm_server", request)
    assert answer["models"] == ["base", *PLANS]
    left = []
    for name, model in trained.items():
        rows = [i for i, chosen in enumerate(names) if chosen == name]
        given = [answer["answers"][i] for i in rows]
        assert all(len(tokens) == NEW for tokens in given)
        left += [(name, m) for m in divergences(model, [prompts[i] for i in rows], given) if m is not None]
    print(f"vLLM {answer['version']}: {REQUESTS} answers in {answer['seconds']:.0f} s; other than ours: {left}")
    assert all(margin < CLOSE for _, margin in left)
    assert len(left) <= REQUESTS / 100
    # Each adapter changes the answers, or the comparison says nothing.
    for name in PLANS:
        rows = [i for i, chosen in enumerate(names) if chosen == name]
        changed = divergences(trained["base"], [prompts[i] for i in rows], [answer["answers"][i] for i in rows])
        assert any(margin is not None for margin in changed)
