"""The projection: what LoRA and steering share is removed from the steering after every update."""

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
from test_orthogonality import PAIR, draw, overlap, pair, with_singular_values
from tiny import close, fast_jit, identical, supervised_batch

import jaxsteer
from jaxsteer import (
    LoRA,
    Model,
    ModelConfig,
    NonlinearSteering,
    OptimConfig,
    Params,
    Slot,
    combine,
    init_base,
    init_state,
    init_steering,
    make_optimizer,
    param_labels,
    partition,
    train_step,
)
from jaxsteer.interventions import LoReFT, PiSSA
from jaxsteer.orthogonality import Orthogonality
from jaxsteer.types import Positions

PROJECTION = Orthogonality("projection")

# ---- as an optimizer

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
    trained, rest = partition(Params({}, pair(S, B)), labels)
    state = tx.init(trained)
    for step in range(steps):
        grads = jax.tree.map(lambda leaf, step=step: jnp.asarray(draw(*leaf.shape, seed=9 + step)), trained)
        trained, state = update(tx, grads, state, trained, rest)
        yield combine(trained, rest).steering, state


def first_moment(state, slot, site, name):
    """Adam's first moment of a parameter."""
    found = optax.tree.get_all_with_path(state, "mu", lambda path, value: isinstance(value, Params))
    (moment,) = jax.tree.leaves([moment.steering[slot][site][name] for _, moment in found])
    return moment


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


def test_lora_that_starts_at_zero_is_projected_out_from_its_first_update():
    for steering, _ in descend(SHARED, np.zeros((2, 32, 4), np.float32)):
        assert np.all(overlap(PAIR, steering) <= 1e-6)
        assert np.all(overlap(PAIR, pair(SHARED, steering["lora"]["mlp.down"]["B"])) > 1e-3)


def test_lora_at_zero_and_layers_without_lora_are_not_projected():
    none = Orthogonality("none")
    for plan, B, kept in (
        (PAIR, np.zeros((2, 32, 4), np.float32), slice(0, 2)),
        ((Slot("lora", LoRA(rank=4), ("mlp.down",), (1,)), PAIR[1]), draw(1, 32, 4), slice(0, 1)),
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


@pytest.mark.parametrize("wrap", [lambda adam: adam, lambda adam: optax.chain(optax.chain(adam), optax.identity())])
def test_moments_are_found_in_other_optimizers_and_whatever_the_slots_are_called(wrap):
    plan = (PAIR[0], replace(PAIR[1], name="mu"))
    tree = lambda S, B: {"lora": pair(S, B)["lora"], "mu": pair(S, B)["steer"]}
    params = Params({}, tree(SHARED, draw(2, 32, 4)))
    grads = Params({}, tree(draw(2, 3, 32), draw(2, 32, 4, seed=1)))
    tx = jaxsteer.project_orthogonal(wrap(optax.adam(0.05)), plan, PROJECTION)
    params, state = update(tx, grads, tx.init(params), params, None)
    assert np.all(overlap(plan, params.steering) <= 1e-6)
    moment, B = first_moment(state, "mu", "block", "D"), params.steering["lora"]["mlp.down"]["B"]
    assert np.all(overlap(plan, tree(moment, B)) <= 1e-6)
    assert np.all(np.linalg.norm(moment, axis=(1, 2)) > 1e-2)


def test_the_norm_after_the_projection_is_taken_into_account():
    B, factors = draw(2, 32, 4), {"mlp.down": jnp.asarray(1 + draw(2, 32, seed=2) / 2)}
    tx = jaxsteer.project_orthogonal(optax.set_to_zero(), PAIR, PROJECTION, lambda base: base["factors"])
    params = Params({"factors": factors}, pair(SHARED, B))
    updates, _ = tx.update(jax.tree.map(jnp.zeros_like, params), tx.init(params), params)
    steering = optax.apply_updates(params, updates).steering
    assert np.all(jaxsteer.joint_overlap(PAIR, steering, PROJECTION, factors) <= 1e-6)
    assert np.all(overlap(PAIR, steering) > 1e-3)


# ---- in the training step

TINY = ModelConfig(vocab_size=19, width=32, layers=4, heads=2, kv_heads=1, head_dim=8, mlp_width=24)
PLAN = (
    Slot("lora", LoRA(rank=2), ("mlp.down",), (0, 1, 2)),
    Slot("pissa", PiSSA(rank=2), ("mlp.down",), (2, 3)),
    Slot("steer", NonlinearSteering(rank=2, init_scale=1.0), ("block",), (1, 2, 3)),
    Slot("reft", LoReFT(rank=2), ("mlp",), None, Positions.parse("first:2+last:2")),
)
BOTH_SIDES = Orthogonality("projection", side="both")
SMOOTH = OptimConfig(lr=1e-3, eps=1e-3, schedule="constant", warmup=0.0)
"""A large eps, so that Adam does not amplify rounding errors of gradients near 0."""
FAR = {"lora": draw(3, 32, 2) / 4, "pissa": draw(2, 32, 2, seed=1) / 4}


@cache
def start():
    """(initial state, state with LoRA moved away from its start, frozen leaves, compiled step, batch) for PLAN."""
    base = fast_jit(init_base, static_argnums=0)(TINY, jax.random.key(7))
    base |= {part: {"embedding": 20 * base[part]["embedding"]} for part in ("embed", "head")}  # gradients that count
    steering = fast_jit(lambda base: init_steering(PLAN, TINY, jax.random.key(1), base=base))(base)
    labels = param_labels(Params(base, steering), PLAN)
    tx = make_optimizer(SMOOTH, labels, 10, PLAN, BOTH_SIDES)
    fresh, frozen = partition(Params(base, steering), labels)
    # While B is nearly 0, or nearly PiSSA's B₀, its span is decided by rounding.
    far = {name: {"mlp.down": fresh.steering[name]["mlp.down"] | {"B": jnp.asarray(B)}} for name, B in FAR.items()}
    moved = fresh._replace(steering=fresh.steering | far)
    step = fast_jit(partial(train_step, model=Model(TINY, PLAN), tx=tx, orthogonality=BOTH_SIDES))
    states = [init_state(params, tx, jax.random.key(0)) for params in (fresh, moved)]
    return *states, frozen, step, supervised_batch(TINY.vocab_size, B=4)


def train(state, batch, steps=3):
    """The state after each step, and the step's metrics."""
    _, _, frozen, step, _ = start()
    for _ in range(steps):
        state, metrics = step(state, batch, frozen)
        yield state, metrics


@pytest.mark.parametrize("state", [0, 1], ids=["fresh", "moved"])
def test_training_keeps_lora_and_steering_apart(state):
    before, (_, _, frozen, _, batch) = start()[state], start()
    for after, metrics in train(before, batch):
        steering = combine(after.params, frozen).steering
        assert metrics.overlap.shape == (4,)
        assert np.all(metrics.overlap <= 1e-6)
        close(metrics.overlap, overlap(PLAN, steering, BOTH_SIDES), 1e-6)
        R = np.asarray(steering["reft"]["mlp"]["R"], np.float64)
        close(R @ R.swapaxes(-1, -2), np.broadcast_to(np.eye(2), (4, 2, 2)), 1e-5)
        for slot, site, name in (("steer", "block", "D"), ("steer", "block", "U"), ("reft", "mlp", "R")):
            steering[slot][site][name] = first_moment(after.opt_state, slot, site, name)
        assert np.all(overlap(PLAN, steering, BOTH_SIDES) <= 1e-6)
    moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), after.params, before.params)
    assert min(jax.tree.leaves(moved)) > 3e-4


def test_projection_with_accumulated_microbatches_is_that_of_one_batch():
    _, state, _, _, batch = start()
    micro = jax.tree.map(lambda field: field.reshape(2, 2, -1), batch)
    for (got, _), (want, _) in zip(train(state, micro), train(state, batch), strict=True):
        close(got.params, want.params, 1e-6)


SHARDED = """
import jax, jax.numpy as jnp, numpy as np
jax.config.update("jax_num_cpu_devices", 8)
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from test_projection import TINY, start

assert len(jax.devices()) == 8
mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
place = lambda leaf, *axes: jax.device_put(leaf, NamedSharding(mesh, P(*axes)))
wide = lambda leaf: place(leaf, *("model" if n == TINY.width else None for n in leaf.shape))
_, state, frozen, step, batch = start()
state, frozen = jax.tree.map(wide, (state, frozen))
for _ in range(3):
    state, metrics = step(state, place(batch, "data"), frozen)
    assert np.all(metrics.overlap <= 1e-6), metrics.overlap
assert all(len(leaf.sharding.device_set) == 8 for leaf in jax.tree.leaves(state.params))
np.savez(sys.argv[1], *jax.tree.leaves(state.params))
"""


@pytest.mark.cpu
def test_sharded_projection_is_that_of_one_device(tmp_path):
    """Eight CPU devices, in a separate process; the batch and the model width are split over them."""
    root, here = Path(jaxsteer.__file__).parents[1], Path(__file__).parent
    code = f"import sys; sys.path[:0] = [{str(root)!r}, {str(here)!r}]\n{SHARDED}"
    command = [sys.executable, "-c", code, tmp_path / "leaves.npz"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    _, state, _, _, batch = start()
    *_, (want, _) = train(state, batch)
    close(list(np.load(command[-1]).values()), jax.tree.leaves(want.params), 1e-6)
