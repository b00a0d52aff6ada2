"""Weights that compute what steering computes, in models with and without biases, gates and norms of outputs."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import fast_jit, random_steering, run

from jaxsteer import Model, fold_all, init_base, make_batch, parse_plan
from jaxsteer.folding import Folded, biases_needed, unfoldable

BEHIND = (
    "linear(rank=2, alpha=0.5) @ mlp,attn name=behind",
    "loreft(rank=2) @ mlp name=shifted layers=0,2",
    "fixed @ block",
)
BEFORE = (
    "linear(rank=2) @ mlp.in",
    "direft(rank=2) @ mlp.in name=second",
    "lofit_scale @ attn.heads",
    "jola @ attn.heads",
    "lofit @ attn.heads layers=1",
)
UPDATES = ("lora(rank=2) @ attn.o,mlp.up", "dora(rank=2) @ mlp.down")
LEFT = (
    "nonlinear(rank=2) @ block",
    "linear(rank=2) @ block name=skipped",
    "linear(rank=2) @ attn positions=last name=q",
)


@pytest.fixture(scope="module")
def plain(tiny_config):
    return dataclasses.replace(tiny_config, layers=3)


def case(config, texts):
    plan = parse_plan(texts, config)
    base = jax.tree.map(lambda leaf: leaf + 0.1, fast_jit(init_base, static_argnums=0)(config, jax.random.key(2)))
    return plan, base, random_steering(plan, config, scale=0.3)


def fold(config, plan, base, steering):
    """`fold_all` as one program."""
    static = []

    def arrays(base, steering):
        folded = fold_all(config, plan, base, steering)
        static.append((folded.config, folded.plan))
        return folded.base, folded.steering

    base, steering = fast_jit(arrays)(base, steering)
    return Folded(static[0][0], base, static[0][1], steering)


def hidden(config, plan, base, steering):
    tokens = np.random.default_rng(3).integers(0, config.vocab_size, (2, 6), np.int32)
    return run(Model(config, plan), base, steering, make_batch(jnp.asarray(tokens))).hidden


@pytest.mark.parametrize(
    ("features", "texts", "left"),
    [
        ({}, (*UPDATES, *BEHIND, *BEFORE), ()),
        ({}, (*BEFORE, *LEFT, *UPDATES), ("nonlinear", "skipped", "q")),
        ({"gated": False, "mlp_bias": True, "attn_bias": True}, (*BEHIND, *BEFORE), ()),
        ({"post_norm": True, "norm_plus_one": True}, (*BEFORE, *BEHIND), ("behind", "shifted", "fixed")),
    ],
    ids=["all", "some", "biases", "post_norm"],
)
def test_folded_weights_compute_the_same(plain, features, texts, left):
    config = dataclasses.replace(plain, **features)
    plan, base, steering = case(config, texts)
    folded = fold(config, plan, base, steering)
    assert tuple(slot.name for slot in folded.plan) == left
    assert set(folded.steering) == set(left)
    got = hidden(folded.config, folded.plan, folded.base, folded.steering)
    want = hidden(config, plan, base, steering)
    np.testing.assert_allclose(got, want, atol=2e-6)
    off = jax.tree.map(np.zeros_like, steering)  # the same program
    assert np.abs(want - hidden(config, plan, base, off)).max() > 0.01


def test_a_slot_stays_behind_one_that_cannot_be_merged(plain):
    texts = ("nonlinear(rank=2) @ mlp", "linear(rank=2) @ mlp", "fixed @ block")
    plan, base, steering = case(plain, texts)
    folded = fold(plain, plan, base, steering)
    assert [slot.name for slot in folded.plan] == ["nonlinear", "linear", "fixed"]
    assert folded.config == plain


def test_only_the_biases_that_are_needed(plain):
    shifted = parse_plan(["fixed @ mlp.in layers=0"], plain)
    assert biases_needed(shifted, plain) == {"mlp.gate": "fixed", "mlp.up": "fixed"}
    assert biases_needed(parse_plan(["linear @ mlp", "lofit_scale @ attn.heads"], plain), plain) == {}


@pytest.mark.parametrize(
    ("text", "features", "word"),
    [
        ("nonlinear @ mlp", {}, "not affine"),
        ("loreft(activation=relu) @ mlp", {}, "not affine"),
        ("linear @ block", {}, "passes every projection by"),
        ("fixed @ mlp positions=last", {}, "positions last"),
        ("lora @ attn.q positions=prompt", {}, "positions prompt"),
        ("linear @ attn", {"post_norm": True}, "norm lies between attn.o"),
        ("fixed @ block", {"post_norm": True}, "norm lies between mlp.down"),
    ],
)
def test_the_reason_names_the_slot(plain, text, features, word):
    config = dataclasses.replace(plain, **features)
    (slot,) = parse_plan([text.replace("(activation", "(rank=2, activation")], config)
    reason = unfoldable(slot, config)
    assert word in reason
    assert f"slot '{slot.name}'" in reason


def test_what_can_be_merged_has_no_reason(plain):
    assert [unfoldable(slot, plain) for slot in parse_plan([*UPDATES, *BEHIND, *BEFORE], plain)] == [None] * 10
