"""LoRA and steering in one plan: what they share, the penalty on it, and the projection that takes it out."""

import subprocess
import sys
from dataclasses import replace
from functools import cache, partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.test_util import check_grads
from tiny import close, fast_jit, identical, random_steering, supervised_batch

import jaxsteer
from jaxsteer import (
    Fixed,
    LoRA,
    Model,
    ModelConfig,
    Nonlinear,
    OptimConfig,
    Params,
    Slot,
    init_base,
    init_state,
    init_steering,
    make_optimizer,
    orthogonality,
    param_labels,
    split,
    train_step,
)
from jaxsteer.interventions import LoReFT, PiSSA
from jaxsteer.optim import merge
from jaxsteer.orthogonality import Orthogonality, joint_layers, shared_energy
from jaxsteer.types import Batch, Positions

PAIR = (Slot("lora", LoRA(rank=4), ("mlp.down",)), Slot("steer", Nonlinear(rank=3), ("block",)))
PENALTY, PROJECTION = Orthogonality("penalty"), Orthogonality("projection")

overlap = fast_jit(orthogonality.overlap, static_argnums=(0, 2))
penalty_and_grads = fast_jit(jax.value_and_grad(orthogonality.overlap_penalty, argnums=1), static_argnums=(0, 2))


def draw(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def pair(S, B):
    """Steering of PAIR as far as the overlap sees it: S [n, r, D], B [n, D, R]."""
    return {"lora": {"mlp.down": {"B": jnp.asarray(B)}}, "steer": {"block": {"D": jnp.asarray(S)}}}


def energy(S, B):
    """tr(S P Sᵀ) for S [r, D] and B [D, R], as the equation says it, in fp64."""
    S, B = np.asarray(S, np.float64), np.asarray(B, np.float64)
    gram = B.T @ B
    ridge = 1e-6 * np.trace(gram) / len(gram) + 1e-12
    return np.trace(S @ B @ np.linalg.solve(gram + ridge * np.eye(len(gram)), B.T @ S.T))


def omega(S, B):
    return energy(S, B) / np.sum(np.square(S, dtype=np.float64))


def with_singular_values(*values, layers=2, width=32, seed=0):
    """B [n, D, R] with orthonormal directions of these strengths."""
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


def test_steering_at_zero_shares_nothing_and_has_no_gradient():
    value, grads = penalty_and_grads(PAIR, pair(0 * draw(2, 3, 32), draw(2, 32, 4)), PENALTY)
    assert value == 0
    identical(grads, jax.tree.map(jnp.zeros_like, grads))


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


MIXED = (
    Slot("a", LoRA(rank=2), ("mlp.down", "attn.q"), (0, 1)),
    Slot("b", LoRA(rank=3), ("mlp.down", "attn.o"), (1, 2)),
    Slot("c", Nonlinear(rank=2), ("block",), (1, 2, 3)),
    Slot("d", LoReFT(rank=2), ("block", "mlp"), (2,)),
    Slot("e", Fixed(), ("attn", "mlp.in")),
)
COLUMNS = ("B", "U")


def rows_of(steering, names, layer):
    """The directions of "slot/site/parameter" in a layer as rows, for the slots of MIXED that are there."""
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


def test_gradient_of_the_penalty_stops_at_lora_unless_let_through():
    with jax.enable_x64(True):
        shared = fast_jit(lambda S, B: jnp.sum(shared_energy(S, B).inside))
        check_grads(shared, (np.float64(draw(2, 3, 8)), np.float64(draw(2, 4, 8, seed=1))), 1, ("rev",))
    steering = pair(draw(2, 3, 32), draw(2, 32, 4, seed=1))
    _, stopped = penalty_and_grads(PAIR, steering, PENALTY)
    _, through = penalty_and_grads(PAIR, steering, replace(PENALTY, through_lora=True))
    assert not np.any(stopped["lora"]["mlp.down"]["B"])
    assert np.abs(through["lora"]["mlp.down"]["B"]).max() > 1e-2
    close(through["steer"], stopped["steer"], 1e-6)
    assert np.abs(stopped["steer"]["block"]["D"]).max() > 1e-2
    assert orthogonality.overlap_penalty(PAIR, steering, Orthogonality("none")) == 0


LORA, STEER, FIXED = *PAIR, Slot("fixed", Fixed(), ("block",))
INSIDE = Slot("inside", LoRA(), ("attn.q", "mlp.up"))


@pytest.mark.parametrize(
    ("plan", "mode"),
    [
        (PAIR, "penalty"),
        ((LORA,), "none"),
        ((STEER,), "none"),
        ((INSIDE,), "none"),
        ((LORA, FIXED), "none"),  # reads nothing
        ((LORA, Slot("s", Nonlinear(), ("mlp.in",))), "none"),
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
        ({}, (Slot("l", LoRA(), ("mlp.down",), (0, 1)), Slot("s", Nonlinear(), ("block",), (2,))), "share no layer"),
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


# ---- the projection, as an optimizer

ADAM = OptimConfig(lr=0.05, schedule="constant", warmup=0.0)


@cache
def optimizer(settings, plan=PAIR, frozen=()):
    """(labels, optimizer) of a plan without a model."""
    labels = param_labels(Params({}, pair(0, 0)), plan, frozen=frozen)
    return labels, make_optimizer(ADAM, labels, 10, plan, settings)


@partial(fast_jit, static_argnums=0)
def update(tx, grads, state, trained, frozen):
    with jax.numpy_dtype_promotion("standard"):
        updates, state = tx.update(grads, state, trained, frozen=frozen)
        return optax.apply_updates(trained, updates), state


def descend(S, B, settings=PROJECTION, plan=PAIR, frozen=(), steps=3):
    """The whole parameters and the optimizer's state after each update on random gradients."""
    labels, tx = optimizer(settings, plan, frozen)
    trained, rest = split(Params({}, pair(S, B)), labels)
    state = tx.init(trained)
    for step in range(steps):
        grads = jax.tree.map(lambda leaf, step=step: jnp.asarray(draw(*leaf.shape, seed=9 + step)), trained)
        trained, state = update(tx, grads, state, trained, rest)
        yield merge(trained, rest).steering, state


def first_moment(state, slot, site, name):
    """Adam's first moment of a parameter."""
    end = f".mu.steering['{slot}']['{site}']['{name}']"
    (found,) = [x for at, x in jax.tree_util.tree_leaves_with_path(state) if jax.tree_util.keystr(at).endswith(end)]
    return found


SHARED = draw(2, 3, 32, seed=7)


@pytest.mark.parametrize("frozen", [(), ("lora",)], ids=["LoRA trains", "LoRA is frozen"])
@pytest.mark.parametrize(
    "B",
    [
        draw(2, 32, 4),
        with_singular_values(1, 1e-2, 1e-4, 1e-6),
        with_singular_values(1, 1e-5, 1e-7, 0),
        np.repeat(draw(2, 32, 2), 2, axis=2),
        with_singular_values(1e-3, 0, 0, 0),
    ],
    ids=["random", "nearly dependent", "more nearly", "dependent", "one direction"],
)
def test_after_every_projected_update_nothing_is_shared(B, frozen):
    assert np.all(overlap(PAIR, pair(SHARED, B)) > 1e-3)
    for steering, state in descend(SHARED, B, frozen=frozen):
        assert np.all(overlap(PAIR, steering) <= 1e-6)
        moment = first_moment(state, "steer", "block", "D")
        assert np.all(overlap(PAIR, pair(moment, steering["lora"]["mlp.down"]["B"])) <= 1e-6)
        assert np.all(np.linalg.norm(moment, axis=(1, 2)) > 1e-2)
        assert np.array_equal(steering["lora"]["mlp.down"]["B"], B) == bool(frozen)


def test_lora_at_zero_and_layers_without_lora_are_not_projected():
    none = Orthogonality("none")
    for plan, B, kept in (
        (PAIR, np.zeros((2, 32, 4), np.float32), slice(0, 2)),
        ((Slot("lora", LoRA(rank=4), ("mlp.down",), (1,)), STEER), draw(1, 32, 4), slice(0, 1)),
    ):
        both = (descend(SHARED, B, settings, plan, ("lora",)) for settings in (PROJECTION, none))
        for (projected, state), (plain, plain_state) in zip(*both, strict=True):
            identical(projected["steer"]["block"]["D"][kept], plain["steer"]["block"]["D"][kept])
            moments = [first_moment(of, "steer", "block", "D")[kept] for of in (state, plain_state)]
            identical(*moments)


def test_projection_at_every_third_update():
    found = descend(SHARED, draw(2, 32, 4), Orthogonality("projection", every=3), steps=6)
    for step, (steering, _) in enumerate(found, 1):
        assert np.all(overlap(PAIR, steering) <= 1e-6) == (step % 3 == 0), step
    plain = descend(SHARED, draw(2, 32, 4), Orthogonality("none"), steps=2)
    found = descend(SHARED, draw(2, 32, 4), Orthogonality("projection", every=3), steps=2)
    for (got, _), (want, _) in zip(found, plain, strict=True):
        identical(got, want)


def test_projection_leaves_frozen_steering_alone_and_is_the_same_without_jit():
    for steering, _ in descend(SHARED, draw(2, 32, 4), frozen=("steer",), steps=1):
        identical(steering["steer"]["block"]["D"], SHARED)
    compiled = list(descend(SHARED, draw(2, 32, 4), steps=1))
    with jax.disable_jit():
        close(list(descend(SHARED, draw(2, 32, 4), steps=1)), compiled, 1e-6)


# ---- the projection, in the training step

TINY = ModelConfig(vocab_size=19, width=32, layers=4, heads=2, kv_heads=1, head_dim=8, mlp_width=24)
PLAN = (
    Slot("lora", LoRA(rank=2), ("mlp.down",), (0, 1, 2)),
    Slot("pissa", PiSSA(rank=2), ("mlp.down",), (2, 3)),
    Slot("steer", Nonlinear(rank=2), ("block",), (1, 2, 3)),
    Slot("reft", LoReFT(rank=2), ("mlp",), None, Positions.parse("first:2+last:2")),
)
BOTH_SIDES = Orthogonality("projection", side="both")
SMOOTH = OptimConfig(lr=1e-2, eps=1e-3, schedule="constant", warmup=0.0)
"""Adam's eps keeps it from blowing up the rounding of gradients near 0."""


def start(base):
    """(state, frozen leaves, jitted step, batch) of PLAN."""
    model = Model(TINY, PLAN)
    params = Params(base, init_steering(PLAN, TINY, jax.random.key(1), base=base))
    labels = param_labels(params, PLAN)
    tx = make_optimizer(SMOOTH, labels, 10, PLAN, BOTH_SIDES)
    trained, frozen = split(params, labels)
    step = fast_jit(partial(train_step, model=model, tx=tx, orthogonality=BOTH_SIDES))
    return init_state(trained, tx, jax.random.key(0)), frozen, step, supervised_batch(TINY.vocab_size, B=4)


@pytest.fixture(scope="module")
def training():
    """(base, state after three steps); what holds after each of them is checked on the way."""
    base = init_base(TINY, jax.random.key(0))
    state, frozen, step, batch = start(base)
    for _ in range(3):
        state, metrics = step(state, batch, frozen)
        steering = merge(state.params, frozen).steering
        assert metrics.overlap.shape == (4,)
        assert np.all(metrics.overlap <= 1e-6)
        close(metrics.overlap, overlap(PLAN, steering, BOTH_SIDES), 1e-6)
        R = np.asarray(steering["reft"]["mlp"]["R"], np.float64)
        close(R @ R.swapaxes(-1, -2), np.broadcast_to(np.eye(2), (4, 2, 2)), 1e-5)
        for slot, site, name in (("steer", "block", "D"), ("steer", "block", "U"), ("reft", "mlp", "R")):
            steering[slot][site][name] = first_moment(state.opt_state, slot, site, name)
        assert np.all(overlap(PLAN, steering, BOTH_SIDES) <= 1e-6)
    return base, state


def test_training_keeps_lora_and_steering_apart(training):
    base, state = training
    _, frozen, _, _ = start(base)
    B = merge(state.params, frozen).steering["lora"]["mlp.down"]["B"]
    assert np.abs(B).max() > 1e-3  # and what is kept apart has moved


def test_projection_with_accumulated_microbatches_is_that_of_one_batch(training):
    base, want = training
    state, frozen, step, batch = start(base)
    micro = Batch(*(field.reshape(2, 2, -1) for field in batch))
    for _ in range(3):
        state, _ = step(state, micro, frozen)
    close(state.params, want.params, 1e-6)


SHARDED = """
import jax, jax.numpy as jnp, numpy as np
jax.config.update("jax_num_cpu_devices", 8)
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from jaxsteer import init_base
from test_orthogonality import TINY, start

mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
place = lambda leaf, *axes: jax.device_put(leaf, NamedSharding(mesh, P(*axes)))
wide = lambda leaf: place(leaf, *("model" if n == TINY.width else None for n in leaf.shape[:2] + leaf.shape[-1:]))
state, frozen, step, batch = start(init_base(TINY, jax.random.key(0)))
state, frozen = jax.tree.map(lambda leaf: wide(leaf) if leaf.ndim == 3 else place(leaf), (state, frozen))
for _ in range(3):
    state, metrics = step(state, place(batch, "data"), frozen)
    assert np.all(metrics.overlap <= 1e-6), metrics.overlap
assert all(len(leaf.sharding.device_set) == 8 for leaf in jax.tree.leaves(state.params))
np.savez(sys.argv[1], *jax.tree.leaves(state.params))
"""


def test_sharded_projection_is_that_of_one_device(training, tmp_path):
    """Eight CPU devices in a process of their own; batch and the model's width are split over them."""
    _, want = training
    root, here = Path(jaxsteer.__file__).parents[1], Path(__file__).parent
    code = f"import sys; sys.path[:0] = [{str(root)!r}, {str(here)!r}]\n{SHARDED}"
    command = [sys.executable, "-c", code, tmp_path / "leaves.npz"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    close(list(np.load(command[-1]).values()), jax.tree.leaves(want.params), 1e-6)
