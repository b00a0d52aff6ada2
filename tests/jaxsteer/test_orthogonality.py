"""LoRA and steering in one plan: their overlap, and the penalty on it."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiny import close, fast_jit, identical, random_steering

from jaxsteer import FixedVector, LoRA, NonlinearSteering, Slot, orthogonality
from jaxsteer.interventions import LoReFT
from jaxsteer.orthogonality import Orthogonality, joint_layers, shared_energy

PAIR = (Slot("lora", LoRA(rank=4), ("mlp.down",)), Slot("steer", NonlinearSteering(rank=3), ("block",)))
PENALTY = Orthogonality("penalty")

overlap = fast_jit(orthogonality.joint_overlap, static_argnums=(0, 2))
penalty_and_grads = fast_jit(jax.value_and_grad(orthogonality.overlap_penalty, argnums=1), static_argnums=(0, 2))


def draw(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def pair(S, B):
    """The leaves of PAIR's steering that the overlap depends on: S [n, r, D], B [n, D, R]."""
    return {"lora": {"mlp.down": {"B": jnp.asarray(B)}}, "steer": {"block": {"D": jnp.asarray(S)}}}


def energy(S, B):
    """tr(S P Sᵀ) for S [r, D] and B [D, R], straight from the equation, in fp64."""
    S, B = np.asarray(S, np.float64), np.asarray(B, np.float64)
    gram = B.T @ B
    ridge = 1e-6 * np.trace(gram) / len(gram) + 1e-12
    return np.trace(S @ B @ np.linalg.solve(gram + ridge * np.eye(len(gram)), B.T @ S.T))


def omega(S, B):
    return energy(S, B) / np.sum(np.square(S, dtype=np.float64))


def with_singular_values(*values, layers=2, width=32, seed=0):
    """B [n, D, R] with these singular values."""
    u, _, v = np.linalg.svd(draw(layers, width, len(values), seed=seed), full_matrices=False)
    return np.float32(np.einsum("ndr,r,nrs->nds", u, np.array(values), v))


# ---- the overlap


@pytest.mark.parametrize(
    "B",
    [
        draw(2, 32, 4),
        with_singular_values(1, 1e-1, 1e-2, 1e-3),
        with_singular_values(1, 1e-4, 1e-6, 0),
        np.repeat(draw(2, 32, 1), 4, axis=2),
        draw(2, 576, 1) * draw(2, 1, 64, seed=1),
    ],
    ids=["random", "uneven", "nearly dependent", "one direction", "one direction, rank 64"],
)
def test_overlap_is_the_equation_whatever_the_rank(B):
    S = draw(2, 3, B.shape[1], seed=2)
    close(overlap(PAIR, pair(S, B)), np.array([omega(*both) for both in zip(S, B, strict=True)]), 1e-5)


@pytest.mark.parametrize("through_lora", [False, True])
@pytest.mark.parametrize("normalised", [False, True])
def test_overlap_and_its_gradients_are_bounded_where_lora_starts(normalised, through_lora):
    settings = Orthogonality("penalty", normalised=normalised, through_lora=through_lora)
    S, B = draw(2, 3, 32) / 10, draw(2, 32, 4, seed=1)
    for scale in (0, 1e-6):
        small = scale * B / np.linalg.norm(B, axis=(1, 2), keepdims=True)
        value, grads = penalty_and_grads(PAIR, pair(S, small), settings)
        assert (value == 0) if scale == 0 else (0 <= value <= 2)
        assert optax.tree.norm(grads["steer"]) < 10
        assert optax.tree.norm(grads["lora"]) < 1e6  # 1/√ε
        assert bool(optax.tree.norm(grads["lora"])) == (through_lora and scale > 0)


@pytest.mark.parametrize("normalised", [False, True])
def test_steering_at_zero_shares_nothing_and_has_no_gradient(normalised):
    steering = pair(0 * draw(2, 3, 32), draw(2, 32, 4))
    value, grads = penalty_and_grads(PAIR, steering, Orthogonality("penalty", normalised=normalised))
    assert value == 0
    identical(grads, jax.tree.map(jnp.zeros_like, grads))


def test_random_directions_share_what_chance_says():
    steering = pair(draw(200, 3, 32), draw(200, 32, 4, seed=1))
    chance = orthogonality.chance_overlap(PAIR, steering)
    assert chance == 4 / 32
    np.testing.assert_allclose(np.mean(overlap(PAIR, steering)), chance, rtol=0.05)


@pytest.mark.parametrize("condition", [1, 10, 100])
def test_overlap_is_one_inside_loras_span(condition):
    B = with_singular_values(*np.geomspace(1, 1 / condition, 4), layers=5)
    close(overlap(PAIR, pair(draw(5, 3, 4) @ B.swapaxes(1, 2), B)), np.ones(5), 1e-3)


def test_overlap_does_not_depend_on_sizes():
    S, B = draw(2, 3, 32), draw(2, 32, 4, seed=1)
    want = overlap(PAIR, pair(S, B))
    for factor in (1e-2, 1e2):
        close(overlap(PAIR, pair(factor * S, B)), want, 1e-5)
        close(overlap(PAIR, pair(S, factor * B)), want, 1e-5)


def test_a_norm_behind_the_projection_scales_what_is_written():
    S, B, g = draw(2, 3, 32), draw(2, 32, 4, seed=1), 1 + draw(2, 32, seed=2) / 2
    got = orthogonality.joint_overlap(PAIR, pair(S, B), Orthogonality(), {"mlp.down": jnp.asarray(g), "attn.o": None})
    close(got, np.array([omega(s, d[:, None] * b) for s, d, b in zip(S, g, B, strict=True)]), 1e-5)


MIXED = (
    Slot("a", LoRA(rank=2), ("mlp.down", "attn.q"), (0, 1)),
    Slot("b", LoRA(rank=3), ("mlp.down", "attn.o"), (1, 2)),
    Slot("c", NonlinearSteering(rank=2), ("block",), (1, 2, 3)),
    Slot("d", LoReFT(rank=2), ("block", "mlp"), (2,)),
    Slot("e", FixedVector(), ("attn", "mlp.in")),
)
COLUMNS = ("B", "U")


def rows_of(steering, names, layer):
    """The directions of each "slot/site/parameter" in a layer as rows, for the slots of MIXED that steer it."""
    found = []
    for slot, site, name in (text.split("/") for text in names.split()):
        active = next(s for s in MIXED if s.name == slot).active_layers(4)
        if layer in active:
            leaf = np.atleast_2d(steering[slot][site][name][active.index(layer)])
            found.append(leaf.T if name in COLUMNS else leaf)
    return np.concatenate(found)


READ = "c/block/D d/block/W d/block/R d/mlp/W d/mlp/R"
WRITTEN = "c/block/U d/block/R d/mlp/R e/attn/v"
BOTH = "c/block/D c/block/U d/block/W d/block/R d/mlp/W d/mlp/R e/attn/v"


@pytest.mark.parametrize(
    ("side", "sites", "steered", "lora", "layers"),
    [
        ("reads", ("mlp.down",), READ, "a/mlp.down/B b/mlp.down/B", (1, 2)),
        ("writes", ("mlp.down",), WRITTEN, "a/mlp.down/B b/mlp.down/B", (0, 1, 2)),
        ("both", ("mlp.down", "attn.o"), BOTH, "a/mlp.down/B b/mlp.down/B b/attn.o/B", (0, 1, 2)),
        ("reads", ("attn.o",), READ, "b/attn.o/B", (1, 2)),
    ],
)
def test_which_directions_count_and_in_which_layers(side, sites, steered, lora, layers, tiny_config):
    steering = random_steering(MIXED, tiny_config)
    settings = Orthogonality(side=side, sites=sites).resolve(MIXED)
    assert joint_layers(MIXED, steering, settings) == layers
    pairs = [(rows_of(steering, steered, layer), rows_of(steering, lora, layer).T) for layer in layers]
    close(overlap(MIXED, steering, settings), np.array([omega(*both) for both in pairs]), 1e-5)
    for normalised, term in ((True, omega), (False, energy)):
        settings = Orthogonality("penalty", 3.0, normalised, side, sites)
        value, _ = penalty_and_grads(MIXED, steering, settings)
        close(value, np.array(3 * sum(term(*both) for both in pairs)), 1e-5)


# ---- the penalty


def test_gradient_of_the_shared_energy_is_its_slope():
    with jax.enable_x64(True):
        S, B = (jnp.asarray(draw(2, n, 8, seed=n), jnp.float64) for n in (3, 4))
        along = lambda t: jnp.sum(shared_energy(S + t * S[::-1], B + t * B[::-1]).inside)
        value, slope = fast_jit(along), fast_jit(jax.grad(along))
        np.testing.assert_allclose(slope(0.0), (value(1e-5) - value(-1e-5)) / 2e-5, rtol=1e-6)


def test_gradient_of_the_penalty_stops_at_lora_unless_let_through():
    steering = pair(draw(2, 3, 32), draw(2, 32, 4, seed=1))
    _, stopped = penalty_and_grads(PAIR, steering, PENALTY)
    _, through = penalty_and_grads(PAIR, steering, replace(PENALTY, through_lora=True))
    assert not np.any(stopped["lora"]["mlp.down"]["B"])
    assert np.abs(through["lora"]["mlp.down"]["B"]).max() > 1e-2
    close(through["steer"], stopped["steer"], 1e-6)
    assert np.abs(stopped["steer"]["block"]["D"]).max() > 1e-2
    assert orthogonality.overlap_penalty(PAIR, steering, Orthogonality("none")) == 0


LORA, STEER, FIXED = *PAIR, Slot("fixed", FixedVector(), ("block",))
INSIDE = Slot("inside", LoRA(), ("attn.q", "mlp.up"))


@pytest.mark.parametrize(
    ("plan", "mode"),
    [
        (PAIR, "penalty"),
        ((LORA,), "none"),
        ((STEER,), "none"),
        ((INSIDE,), "none"),
        ((LORA, FIXED), "none"),  # reads nothing
        ((LORA, Slot("s", NonlinearSteering(), ("mlp.in",))), "none"),
        ((), "none"),
    ],
)
def test_auto_is_the_penalty_where_lora_and_steering_meet(plan, mode):
    settings = Orthogonality(strength=2.0, side="reads", through_lora=True, every=5)
    assert settings.resolve(plan) == Orthogonality(mode, 2.0, side="reads", through_lora=True, every=5)
    assert Orthogonality("none").resolve(plan) == Orthogonality("none")


@pytest.mark.parametrize(
    ("settings", "plan", "culprit"),
    [
        ({}, (INSIDE, STEER), r"no LoRA writes .* at mlp\.down .*attn\.q, mlp\.up.*attn\.o"),
        ({"sites": ("attn.o",)}, PAIR, r"at attn\.o .*mlp\.down"),
        ({"mode": "penalty"}, (STEER,), "penalty: .*no LoRA"),
        ({"mode": "projection"}, (STEER,), "projection: .*no LoRA"),
        ({"mode": "penalty"}, (LORA,), "penalty: no slot has directions"),
        ({"mode": "projection"}, (LORA, FIXED), r"projection: no slot has directions .*reads"),
        (
            {},
            (Slot("l", LoRA(), ("mlp.down",), (0, 1)), Slot("s", NonlinearSteering(), ("block",), (2,))),
            "share no layer",
        ),
    ],
)
def test_plans_that_cannot_be_kept_apart_raise(settings, plan, culprit):
    with pytest.raises(ValueError, match=culprit):
        Orthogonality(**settings).resolve(plan)


@pytest.mark.parametrize(
    "settings",
    [
        {"mode": "hard"},
        {"side": "left"},
        {"sites": ()},
        {"sites": ("mlp.up",)},
        {"strength": 0.0},
        {"strength": -1.0},
        {"strength": float("nan")},
        {"every": 0},
    ],
)
def test_settings_without_a_meaning_raise(settings):
    with pytest.raises(ValueError, match=f"orthogonality.*{next(iter(settings))}"):
        Orthogonality(**settings)
