"""transformers computes what jaxsteer does: merged, steered and steerable folders of every family, with its cache."""

import json
import subprocess
from dataclasses import replace

import numpy as np
import pytest
from asked import ROOT, ask, greedy, logits, python_of, tokens_for
from tiny import identical, random_steering

from jaxsteer import parse_plan
from jaxsteer.io import SteeredModel, WriteOptions, load_model
from jaxsteer.io.formats import FORMATS
from jaxsteer.io.formats.format import Given
from jaxsteer.models.families import FAMILIES

pytestmark = pytest.mark.slow

NEW = 8
STEERED = (
    "nonlinear(rank=3, alpha=2.0, activation=gelu) @ block",
    "fixed @ block layers=1",
    "linear(rank=2) @ block layers=0,2",
    "loreft(rank=2, activation=tanh) @ block",
    "direft(rank=2) @ block layers=1",
    "lora(rank=2) @ attn.q,mlp.down",
    "linear(rank=2) @ mlp.in name=before",
)


def tiny(golden, family, *texts):
    """A tiny model of a family with random steering."""
    loaded = load_model(golden / ("tiny_llama" if family == "llama" else f"families/{family}"))
    plan = parse_plan(texts, loaded.config)
    return SteeredModel(loaded, plan, random_steering(plan, loaded.config))


def written(model, to, folder, **options):
    """The folder of an export, without its verdict, and what is in it."""
    options = WriteOptions(**options)
    assert not FORMATS[to].refuse(model.plan, FAMILIES[model.loaded.family], model.loaded.config, options)
    reduced = FORMATS[to].reduce(model, options)
    FORMATS[to].write(reduced, folder, options)
    return reduced


def same(model, folder, tmp_path, **request):
    """Ask transformers about a folder, and compare its logits and greedy tokens with the model's."""
    tokens = tokens_for(model.loaded.config)
    request = {"path": str(folder), "tokens": tokens, "generate": NEW, **request}
    answer, theirs = ask("hf", "transformers_peer", request, tmp_path)
    np.testing.assert_allclose(theirs, logits(model, tokens), atol=1e-5, rtol=0)
    assert answer["generated"] == greedy(model, tokens, NEW)
    return answer


@pytest.mark.parametrize("family", FAMILIES)
def test_steered_folders_and_what_transformers_saves_of_them(golden, tmp_path, family):
    model = tiny(golden, family, *STEERED)
    reduced = written(model, "hf-steered", tmp_path / "out")
    same(model, tmp_path / "out", tmp_path, save=str(tmp_path / "again"))
    again = FORMATS["hf-steered"].read(tmp_path / "again", None, Given())
    assert again.plan == reduced.plan
    identical(again.steering, reduced.steering)
    identical(again.base, reduced.base)
    same(model, tmp_path / "again", tmp_path)


@pytest.mark.parametrize("family", FAMILIES)
def test_merged_folders(golden, tmp_path, family):
    model = tiny(golden, family, *STEERED[-2:])
    written(model, "hf", tmp_path / "out")
    same(model, tmp_path / "out", tmp_path, trust=False)


def test_vectors_merged_into_biases(golden, tmp_path):
    model = tiny(golden, "llama", "fixed @ block", "fixed @ attn name=inside")
    written(model, "hf", tmp_path / "out")
    same(model, tmp_path / "out", tmp_path, trust=False)


@pytest.mark.parametrize("family", FAMILIES)
def test_steerable_folders_with_places_that_are_filled(golden, tmp_path, family):
    model = tiny(golden, family, "nonlinear(rank=3, activation=tanh) @ block")
    reduced = written(model, "hf-steerable", tmp_path / "zero")
    same(SteeredModel(model.loaded), tmp_path / "zero", tmp_path)
    filled = replace(reduced, steering=random_steering(reduced.plan, model.loaded.config))
    FORMATS["hf-steerable"].write(filled, tmp_path / "filled", WriteOptions())
    same(filled, tmp_path / "filled", tmp_path)


def test_steering_stays_in_fp32_over_a_bf16_base(golden, tmp_path):
    model = tiny(golden, "llama", *STEERED[:5])
    reduced = written(model, "hf-steered", tmp_path / "out", dtype="bfloat16")
    tokens = tokens_for(model.loaded.config)
    request = {"path": str(tmp_path / "out"), "tokens": tokens, "dtype": "bfloat16", "dtypes": True}
    answer, theirs = ask("hf", "transformers_peer", request | {"save": str(tmp_path / "again")}, tmp_path)
    of = lambda steering: {dtype for name, dtype in answer["dtypes"].items() if (".steering." in name) == steering}
    assert (of(True), of(False)) == ({"float32"}, {"bfloat16"})
    again = FORMATS["hf-steered"].read(tmp_path / "again", None, Given())
    identical(again.steering, model.steering)
    # Both round the residual stream to bf16, in another order of operations.
    np.testing.assert_allclose(theirs, logits(reduced, tokens), atol=0.1, rtol=0)
    plain = SteeredModel(reduced.loaded)
    assert np.abs(logits(reduced, tokens) - logits(plain, tokens)).max() > 1


@pytest.mark.parametrize("to", ["hf-steered", "hf-steerable"])
def test_without_trust_it_does_not_load(golden, tmp_path, to):
    model = tiny(golden, "llama", "nonlinear @ block")
    written(model, to, tmp_path / "out")
    request = {"path": str(tmp_path / "out"), "tokens": [[1]], "generate": 0, "dtype": "float32", "trust": False}
    command = [python_of("hf"), ROOT / "tests" / "peers" / "transformers_peer.py"]
    done = subprocess.run(command, input=json.dumps(request | {"out": ""}), capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "trust_remote_code=True" in done.stderr
