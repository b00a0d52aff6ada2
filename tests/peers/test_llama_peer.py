"""llama.cpp computes what jaxsteer does with exported models, LoRA adapters and control vectors."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from asked import ask, greedy, tokens_for
from exported import family_model, logits, steered_of, written

from jaxsteer.io.formats import FORMATS
from jaxsteer.io.steered import SteeredModel
from jaxsteer.models.families import FAMILIES

pytestmark = pytest.mark.slow

TOLERANCE = 5e-4
HALF_GELU = 1e-2
"""For families with GELU, which llama.cpp looks up in a table of half-precision numbers; without the MLP they are as
near as the others, see below."""


def export(model, name, folder, **options):
    """The folder into which a model is written."""
    written(FORMATS[name], model, folder, **options)
    return folder


def difference(model, path, tokens, base=None):
    """Largest difference between llama.cpp's logits and ours."""
    answer = ask("llama", {"path": str(path), "base": base and str(base), "tokens": tokens})
    return np.abs(answer.values - logits(model, tokens)).max()


def tiny(golden, family):
    """A tiny model, without what no GGUF file can say and without the windows that llama.cpp passes over."""
    loaded = family_model(golden, family)
    config = loaded.config
    if config.query_scale is not None:
        config = replace(config, query_scale=config.head_dim**-0.5)
    if not FAMILIES[family].llama_cpp.windowed:
        config = replace(config, window=None, local_layers=())
    return replace(loaded, config=config)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family(family, golden, tmp_path):
    loaded = tiny(golden, family)
    tokens = tokens_for(loaded.config, length=24)
    tolerance = HALF_GELU if loaded.config.activation == "gelu_tanh" else TOLERANCE
    base = export(SteeredModel(loaded), "gguf", tmp_path / "base")
    assert difference(SteeredModel(loaded), base, tokens) <= tolerance
    sites = "attn.q,attn.k,attn.o,mlp.up,mlp.down" + (",mlp.gate" if loaded.config.gated else "")
    last = loaded.config.layers - 1
    plans = {
        "gguf-lora": (f"lora(rank=3, alpha=6) @ {sites}", "lora(rank=2, alpha=5) @ attn.v name=v layers=1"),
        "gguf-control": (f"fixed @ block layers=1-{last}", "fixed @ mlp layers=1 name=m"),
    }
    for name, plan in plans.items():
        model = steered_of(loaded, *plan, scale=0.2)
        assert np.abs(logits(model, tokens) - logits(SteeredModel(loaded), tokens)).max() > 10 * tolerance
        assert difference(model, export(model, name, tmp_path / name), tokens, base) <= tolerance, name
    if family in ("llama", "mistral", "gpt2"):
        model = steered_of(loaded, "fixed @ block", scale=0.2)
        assert difference(model, export(model, "gguf", tmp_path / "bias"), tokens) <= tolerance


@pytest.mark.parametrize("family", ["gemma2", "gemma3", "gpt2"])
def test_of_families_with_gelu_everything_but_gelu_agrees(family, golden, tmp_path):
    loaded = tiny(golden, family)
    mlp = loaded.base["blocks"]["mlp"]
    mlp = mlp | {"down": jax.tree.map(jnp.zeros_like, mlp["down"])}
    model = SteeredModel(replace(loaded, base=loaded.base | {"blocks": loaded.base["blocks"] | {"mlp": mlp}}))
    folder = export(model, "gguf", tmp_path / "base")
    assert difference(model, folder, tokens_for(loaded.config, length=24)) <= 1e-4


@pytest.fixture(scope="module")
def smollm2_base(smollm2, tmp_path_factory):
    return export(SteeredModel(smollm2), "gguf", tmp_path_factory.mktemp("gguf") / "base", dtype="float32")


TEXTS = (
    "The capital of France is the city of Paris, which lies on the river Seine in the north of the country.",
    "def fibonacci(n):\n    if n < 2:\n        return n\n    return fibonacci(n - 1) + fibonacci(n - 2)\n",
)


@pytest.mark.parametrize(
    ("name", "plan", "scale"),
    [
        ("gguf", (), 0.0),
        ("gguf-control", ("fixed @ block layers=1-29",), 0.1),
        ("gguf", ("fixed @ block",), 0.1),
        ("gguf-lora", ("lora(rank=4, alpha=8) @ attn.q,attn.o,mlp.gate,mlp.down",), 0.02),
    ],
)
def test_smollm2(name, plan, scale, smollm2, smollm2_base, tmp_path):
    model = steered_of(smollm2, *plan, scale=scale)
    tokens = [smollm2.tokenizer(text)["input_ids"][:18] for text in TEXTS]
    options = {"dtype": "float32"} if name == "gguf" else {}
    folder = export(model, name, tmp_path / "out", **options) if plan else smollm2_base
    request = {"path": str(folder), "base": str(smollm2_base), "tokens": tokens, "generate": 8, "text": list(TEXTS)}
    answer = ask("llama", request)
    ours = logits(model, tokens)
    print(f"{name} {plan}: {np.abs(answer.values - ours).max():.1e}")
    assert np.abs(answer.values - ours).max() <= TOLERANCE
    assert answer.generated.tolist() == greedy(model, tokens, 8)
    assert answer.said["text_tokens"] == [smollm2.tokenizer(text)["input_ids"] for text in TEXTS]
