"""transformers computes what jaxsteer does: merged, steered and steerable folders of every family, with its cache."""

from dataclasses import replace

import numpy as np
import pytest
from asked import ask, greedy, tokens_for
from exported import family_model, logits, read_again, steered_of, written
from tiny import identical, random_steering

from jaxsteer.io import SteeredModel, WriteOptions
from jaxsteer.io.formats import FORMATS
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


def export(model, to, folder, **options):
    """What was to be written into a folder, and is."""
    return written(FORMATS[to], model, folder, **options)


def same(model, folder, **request):
    """Ask transformers about a folder, and compare its logits and greedy tokens with the model's."""
    tokens = tokens_for(model.loaded.config)
    request = {"path": str(folder), "tokens": tokens, "generate": NEW, **request}
    answer = ask("transformers", request)
    np.testing.assert_allclose(answer.values, logits(model, tokens), atol=1e-5, rtol=0)
    assert answer.generated.tolist() == greedy(model, tokens, NEW)


@pytest.mark.parametrize("family", FAMILIES)
def test_steered_folders_and_what_transformers_saves_of_them(golden, tmp_path, family):
    model = steered_of(family_model(golden, family), *STEERED)
    reduced = export(model, "hf-steered", tmp_path / "out")
    same(model, tmp_path / "out", save=str(tmp_path / "again"))
    again = read_again(FORMATS["hf-steered"], tmp_path / "again")
    assert again.plan == reduced.plan
    identical(again.steering, reduced.steering)
    identical(again.base, reduced.base)
    same(model, tmp_path / "again")


@pytest.mark.parametrize("family", FAMILIES)
def test_merged_folders(golden, tmp_path, family):
    model = steered_of(family_model(golden, family), *STEERED[-2:])
    export(model, "hf", tmp_path / "out")
    same(model, tmp_path / "out", trust=False)


def test_vectors_merged_into_biases(golden, tmp_path):
    model = steered_of(family_model(golden, "llama"), "fixed @ block", "fixed @ attn name=inside")
    export(model, "hf", tmp_path / "out")
    same(model, tmp_path / "out", trust=False)


@pytest.mark.parametrize("family", FAMILIES)
def test_steerable_folders_with_places_that_are_filled(golden, tmp_path, family):
    model = steered_of(family_model(golden, family), "nonlinear(rank=3, activation=tanh) @ block")
    reduced = export(model, "hf-steerable", tmp_path / "zero")
    same(SteeredModel(model.loaded), tmp_path / "zero")
    filled = replace(reduced, steering=random_steering(reduced.plan, model.loaded.config))
    FORMATS["hf-steerable"].write(filled, tmp_path / "filled", WriteOptions())
    same(filled, tmp_path / "filled")


def test_steering_stays_in_fp32_over_a_bf16_base(golden, tmp_path):
    model = steered_of(family_model(golden, "llama"), *STEERED[:5])
    reduced = export(model, "hf-steered", tmp_path / "out", dtype="bfloat16")
    tokens = tokens_for(model.loaded.config)
    request = {"path": str(tmp_path / "out"), "tokens": tokens, "dtype": "bfloat16", "dtypes": True}
    answer = ask("transformers", request | {"save": str(tmp_path / "again")})
    of = lambda steering: {dtype for name, dtype in answer.said["dtypes"].items() if (".steering." in name) == steering}
    assert (of(True), of(False)) == ({"float32"}, {"bfloat16"})
    again = read_again(FORMATS["hf-steered"], tmp_path / "again")
    identical(again.steering, model.steering)
    # Both round the residual stream to bf16, in another order of operations.
    np.testing.assert_allclose(answer.values, logits(reduced, tokens), atol=0.1, rtol=0)
    plain = SteeredModel(reduced.loaded)
    assert np.abs(logits(reduced, tokens) - logits(plain, tokens)).max() > 1


@pytest.mark.parametrize("to", ["hf-steered", "hf-steerable"])
def test_without_trust_it_does_not_load(golden, tmp_path, to):
    model = steered_of(family_model(golden, "llama"), "nonlinear @ block")
    export(model, to, tmp_path / "out")
    with pytest.raises(ValueError, match="trust_remote_code=True"):
        ask("transformers", {"path": str(tmp_path / "out"), "tokens": [[1]], "trust": False})
