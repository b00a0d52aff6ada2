"""What trains, at which rate, and what does not."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiny import close, fast_jit, identical, random_steering, slot_of

from jaxsteer import (
    LoRA,
    NonlinearSteering,
    OptimConfig,
    Params,
    Slot,
    combine,
    count_parameters,
    make_optimizer,
    param_labels,
    partition,
)
from jaxsteer.interventions import LoReFT
from jaxsteer.optim import learning_rates, make_schedule, retract, tangent
from jaxsteer.orthogonality import Orthogonality, joint_overlap
from jaxsteer.steering import count_trained

PLAIN = {"schedule": "constant", "warmup": 0.0, "clip": None}


@pytest.fixture(scope="module")
def plan(tiny_config):
    return (
        slot_of("lora", tiny_config, slot="lora", sites=("mlp.down",)),
        slot_of("nonlinear", tiny_config, slot="steer", sites=("block",)),
        slot_of("fixed", tiny_config, slot="still", sites=("mlp",)),
    )


@pytest.fixture(scope="module")
def params(plan, tiny_config, tiny_base):
    return Params(tiny_base, random_steering(plan, tiny_config))


@pytest.fixture(autouse=True)
def standard_promotion():
    """Outside jit optax itself raises floats to integer steps, which strict promotion refuses."""
    with jax.numpy_dtype_promotion("standard"):
        yield


def gradients(tree, scale=1.0):
    draw = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: jnp.asarray(scale * draw.standard_normal(leaf.shape, np.float32)), tree)


def first_update(tx, grads, trained):
    """(updates, state) of an optimizer's first step, compiled."""
    return fast_jit(lambda grads, trained: tx.update(grads, tx.init(trained), trained))(grads, trained)


def test_labels(params, plan):
    labels = param_labels(params, plan, frozen=("still",))
    assert set(jax.tree.leaves(labels.base)) == {"frozen"}
    assert labels.steering["lora"]["mlp.down"] == {"A": "weights", "B": "weights"}
    assert labels.steering["steer"]["block"] == {"D": "activations", "U": "activations"}
    assert labels.steering["still"]["mlp"] == {"v": "frozen"}
    assert set(jax.tree.leaves(param_labels(params, plan, train_base=True).base)) == {"weights"}


def test_constants_of_a_method_do_not_train(tiny_config):
    plan = (
        slot_of("pissa", tiny_config, slot="pissa", sites=("mlp.down",)),
        slot_of("lofit", tiny_config, slot="lofit"),
        slot_of("fixed", tiny_config, slot="still", sites=("mlp",)),
    )
    params = Params({}, random_steering(plan, tiny_config))
    labels = param_labels(params, plan, frozen=("still",))
    assert labels.steering["pissa"]["mlp.down"] == {"A": "weights", "B": "weights", "A0": "frozen", "B0": "frozen"}
    assert labels.steering["lofit"]["attn.heads"] == {"v": "activations", "selected": "frozen"}
    selected = params.steering["lofit"]["attn.heads"] | {"selected": jnp.ones((4, 4))}
    steering = params.steering | {"lofit": {"attn.heads": selected}}
    trained, _ = partition(params, labels)
    assert count_trained(plan, steering, ("still",)) == count_parameters(trained)


def test_split_and_merge(params, plan):
    labels = param_labels(params, plan, frozen=("still",))
    trained, frozen = partition(params, labels)
    assert not jax.tree.leaves(trained.base)
    assert not jax.tree.leaves(trained.steering["still"])
    assert len(jax.tree.leaves(trained)) == 4
    identical(combine(trained, frozen), params)
    assert count_trained(plan, params.steering, ("still",)) == count_parameters(trained) > 0


def test_each_group_moves_at_its_own_rate_and_frozen_slots_do_not(params, plan):
    labels = param_labels(params, plan, frozen=("still",))
    trained, frozen = partition(params, labels)
    config = OptimConfig(lr=1e-2, weights_lr=1e-4, **PLAIN)
    tx = make_optimizer(config, labels, 10)
    grads = gradients(trained)
    updates, _ = first_update(tx, grads, trained)
    moved = combine(optax.apply_updates(trained, updates), frozen)
    # Adam's first step is the rate times the sign of the gradient.
    for name, rate in (("lora", 1e-4), ("steer", 1e-2)):
        for got, grad in zip(
            jax.tree.leaves(updates.steering[name]), jax.tree.leaves(grads.steering[name]), strict=True
        ):
            np.testing.assert_allclose(got, -rate * np.sign(grad), rtol=1e-3)
    identical(moved.steering["still"], params.steering["still"])
    identical(moved.base, params.base)


def test_optimizer_state_holds_trained_leaves_only(params, plan):
    labels = param_labels(params, plan, frozen=("still",))
    trained, _ = partition(params, labels)
    state = make_optimizer(OptimConfig(), labels, 10).init(trained)
    big = [leaf for leaf in jax.tree.leaves(state) if leaf.ndim]
    assert sum(leaf.size for leaf in big) == 2 * count_parameters(trained)  # two moments
    assert {leaf.dtype for leaf in big} == {jnp.dtype("float32")}


@pytest.mark.parametrize("scale", [1e-3, 10.0])
def test_clip_is_over_both_groups_together(scale, params, plan):
    labels = param_labels(params, plan)
    trained, _ = partition(params, labels)
    config = OptimConfig(**(PLAIN | {"clip": 2.0}))
    tx = make_optimizer(config, labels, 10)
    grads = gradients(trained, scale)
    norm = optax.tree.norm(grads)
    assert (norm > 2) == (scale == 10.0)
    _, state = first_update(tx, grads, trained)
    moments = jax.tree.leaves([moment for _, moment in optax.tree.get_all_with_path(state, "mu")])
    assert len(moments) == len(jax.tree.leaves(trained))
    # The first moment after one step is (1 − b1) × the clipped gradient.
    np.testing.assert_allclose(optax.tree.norm(moments) / (1 - config.b1), min(norm, 2.0), rtol=1e-5)


def test_weight_decay_is_decoupled(params, plan):
    labels = param_labels(params, plan)
    trained, _ = partition(params, labels)
    tx = make_optimizer(OptimConfig(lr=0.1, weight_decay=0.5, **PLAIN), labels, 10)
    updates, _ = first_update(tx, jax.tree.map(np.zeros_like, trained), trained)
    for update, value in zip(jax.tree.leaves(updates), jax.tree.leaves(trained), strict=True):
        np.testing.assert_allclose(update, -0.05 * value, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize(
    ("kind", "halfway", "end"), [("constant", 1.0, 1.0), ("linear", 0.5, 0.0), ("cosine", 0.5, 0.0)]
)
def test_schedules(kind, halfway, end):
    rate = make_schedule(OptimConfig(3.0, schedule=kind, warmup=0.2), "activations", 100)
    got = [float(rate(step)) for step in (0, 10, 20, 60, 100)]
    np.testing.assert_allclose(got, [0, 1.5, 3, 3 * halfway, 3 * end], atol=1e-6)
    cosine = 0.5 * (1 + np.cos(np.pi / 4))
    want = {"constant": 1.0, "linear": 0.75, "cosine": cosine}[kind]
    np.testing.assert_allclose(float(rate(40)), 3 * want, rtol=1e-5)
    assert float(make_schedule(OptimConfig(3.0, schedule=kind, warmup=0.0), "activations", 100)(0)) == 3


def test_each_group_may_have_a_schedule_of_its_own():
    joint = OptimConfig(1.0, 2.0, "linear", 0.0, weights_schedule="cosine", weights_warmup=0.5)
    at = lambda group, step: float(make_schedule(joint, group, 100)(step))
    np.testing.assert_allclose([at("activations", step) for step in (0, 25, 50, 75, 100)], [1, 0.75, 0.5, 0.25, 0])
    np.testing.assert_allclose([at("weights", step) for step in (0, 25, 50, 75, 100)], [0, 1, 2, 1, 0], atol=1e-6)
    assert make_schedule(OptimConfig(weights_warmup=0.0), "weights", 100)(0) > 0  # 0 is a share, not "as the others"


def test_a_traced_peak_replaces_the_configs():
    peaks = jnp.array([1e-3, 3e-2])
    rates = jax.jit(jax.vmap(lambda peak: make_schedule(OptimConfig(), "activations", 100, peak)(40)))(peaks)
    want = [make_schedule(OptimConfig(float(peak)), "activations", 100)(40) for peak in peaks]
    np.testing.assert_allclose(rates, want, rtol=1e-6)


def test_rates_for_the_log():
    config = OptimConfig(lr=1e-2, weights_lr=1e-3, schedule="linear", warmup=0.0)
    assert learning_rates(config, 5, 10) == pytest.approx({"activations": 5e-3, "weights": 5e-4})
    assert learning_rates(OptimConfig(), 5, 10)["weights"] > 0


@pytest.mark.parametrize("kind", ["constant", "linear", "cosine"])
def test_rates_for_the_log_are_the_schedules(kind):
    """Computed on the host, step by step, they are what the optimizer uses: in warmup, decay and past the end."""
    config = OptimConfig(2e-3, 1e-3, "linear", 0.25, weights_schedule=kind, weights_warmup=0.4)
    want = {group: make_schedule(config, group, 10)(np.arange(13)) for group in ("activations", "weights")}
    for step in range(13):
        got = learning_rates(config, step, 10)
        assert all(type(rate) is float for rate in got.values())
        assert got == pytest.approx({group: float(rates[step]) for group, rates in want.items()}, rel=1e-6, abs=1e-10)


@pytest.mark.parametrize(
    ("settings", "culprit"),
    [
        ({"lr": 0.0}, "optim.lr"),
        ({"lr": float("nan")}, "optim.lr"),
        ({"weights_lr": -1.0}, "optim.weights_lr"),
        ({"warmup": 1.0}, "optim.warmup"),
        ({"warmup": -0.1}, "optim.warmup"),
        ({"clip": 0.0}, "optim.clip"),
        ({"schedule": "sawtooth"}, "optim.schedule: .*sawtooth"),
        ({"schedule": None}, "optim.schedule"),
        ({"weights_schedule": "sawtooth"}, "optim.weights_schedule: .*sawtooth"),
        ({"weights_warmup": 1.0}, "optim.weights_warmup"),
    ],
)
def test_impossible_settings_raise(settings, culprit):
    with pytest.raises(ValueError, match=culprit):
        OptimConfig(**settings)


def test_impossible_requests_raise(params, plan):
    with pytest.raises(ValueError, match="nobody"):
        param_labels(params, plan, frozen=("nobody",))
    with pytest.raises(ValueError, match="step"):
        make_optimizer(OptimConfig(), param_labels(params, plan), 0)


# ---- orthonormal parameters


def random(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape, np.float32))


def not_orthonormal(rows):
    """Largest entry of |R Rᵀ − I|."""
    return jnp.abs(jnp.einsum("...rd,...sd->...rs", rows, rows, precision="highest") - jnp.eye(rows.shape[-2])).max()


def test_retraction_gives_orthonormal_rows_and_leaves_those_that_are():
    rows = retract(random(5, 4, 16))
    assert not_orthonormal(rows[0]) < 1e-6
    close(retract(rows), rows, 1e-6)
    close(retract(-rows), -rows, 1e-6)
    close(retract(3 * rows), rows, 1e-6)


def test_tangent_keeps_rows_orthonormal_to_first_order():
    rows = retract(random(4, 16))
    grad = random(4, 16, seed=1)
    kept = tangent(grad, rows)
    inner = kept @ rows.T
    close(inner, -inner.T, 1e-5)
    close(tangent(kept, rows), kept, 1e-5)  # a projection, and an orthogonal one
    np.testing.assert_allclose(jnp.vdot(kept, grad - kept), 0, atol=1e-5)
    # The error of R + t G is of second order in t, and the retraction differs from it by as little.
    errors = [not_orthonormal(rows + t * kept) for t in (1e-1, 1e-2)]
    assert errors[1] < errors[0] / 50
    assert jnp.abs(retract(rows + 1e-2 * kept) - (rows + 1e-2 * kept)).max() < 1e-2 * jnp.abs(kept).max()


REFT = (Slot("reft", LoReFT(rank=4), ("block",)),)


def test_500_steps_of_adam_keep_rows_orthonormal_and_find_the_best_ones():
    """R that maximises tr(R M Rᵀ) spans the top eigenvectors of M."""
    scale = jnp.diag(jnp.linspace(0, 1, 16))
    params = Params({}, {"reft": {"block": {"R": retract(random(1, 4, 16)), "W": random(1, 4, 16), "b": random(1, 4)}}})
    tx = make_optimizer(OptimConfig(lr=0.1, clip=None), param_labels(params, REFT), 500, REFT)

    def energy(params):
        R = params.steering["reft"]["block"]["R"]
        return jnp.einsum("ard,de,are->", R, scale, R)

    def step(carry, _):
        params, state = carry
        grads = jax.grad(lambda params: -energy(params))(params)
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        return (params, state), not_orthonormal(params.steering["reft"]["block"]["R"][0])

    train = fast_jit(lambda params: jax.lax.scan(step, (params, tx.init(params)), length=500))
    (params, _), errors = train(params)
    assert errors.max() <= 1e-5
    np.testing.assert_allclose(energy(params), jnp.linspace(0, 1, 16)[-4:].sum(), rtol=1e-4)


def test_rows_without_the_constraint_and_frozen_ones_are_left_to_the_inner_optimizer():
    leaves = {"R": retract(random(2, 4, 16)), "W": random(2, 4, 16), "b": random(2, 4)}
    params = Params({}, {"reft": {"block": leaves}})
    free = (Slot("reft", LoReFT(rank=4, constrained=False), ("block",)),)
    config = OptimConfig(lr=0.1, **PLAIN)
    for plan, names in ((free, ("W", "R", "b")), (REFT, ("W", "b"))):
        labels = param_labels(params, plan)
        tx, plain = make_optimizer(config, labels, 10, plan), make_optimizer(config, labels, 10)
        grads = gradients(params)
        (got, _), (want, _) = (of.update(grads, of.init(params), params) for of in (tx, plain))
        for name in names:
            identical(got.steering["reft"]["block"][name], want.steering["reft"]["block"][name])
    mixed = (*REFT, Slot("steer", NonlinearSteering(rank=2), ("block",)))
    params = Params({}, params.steering | {"steer": {"block": {"D": random(2, 2, 16), "U": random(2, 16, 2)}}})
    labels = param_labels(params, mixed, frozen=("reft",))
    trained, frozen = partition(params, labels)
    tx = make_optimizer(config, labels, 10, mixed)
    updates, _ = tx.update(gradients(trained), tx.init(trained), trained, frozen=frozen)
    identical(combine(optax.apply_updates(trained, updates), frozen).steering["reft"], params.steering["reft"])
    assert len(jax.tree.leaves(updates)) == 2


# ---- several learning rates as one program

JOINT = (
    Slot("lora", LoRA(rank=2), ("mlp.down",)),
    Slot("steer", NonlinearSteering(rank=2), ("block",)),
    Slot("reft", LoReFT(rank=3), ("block",)),
)
TARGETS = {
    "lora": {"mlp.down": {"A": random(2, 2, 8), "B": random(2, 16, 2)}},
    "steer": {"block": {"D": random(2, 2, 16, seed=1), "U": random(2, 16, 2, seed=2)}},
    "reft": {"block": {"R": random(2, 3, 16, seed=3), "W": random(2, 3, 16, seed=4), "b": random(2, 3)}},
}


def trained_towards_targets(config, start, peaks=None):
    """JOINT after six steps down the squared distance from TARGETS, projected and with orthonormal R."""
    projection = Orthogonality("projection")
    tx = make_optimizer(config, param_labels(start, JOINT), 8, JOINT, projection, peaks)

    def step(carry, _):
        params, state = carry
        grads = jax.tree.map(jnp.subtract, params, Params({}, TARGETS))
        updates, state = tx.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), None

    (params, _), _ = jax.lax.scan(step, (start, tx.init(start)), length=6)
    return params.steering


def test_two_learning_rates_as_one_vmapped_program_are_two_optimizers():
    config = OptimConfig(schedule="cosine", warmup=0.25)
    rates, weights = [1e-3, 1e-1], [2e-3, 5e-3]
    starts = jax.tree.map(lambda leaf: np.stack([leaf / 2, 0.1 - leaf]), jax.tree.map(np.asarray, TARGETS))
    starts["reft"]["block"]["R"] = retract(starts["reft"]["block"]["R"])
    peaks = {"activations": jnp.array(rates), "weights": jnp.array(weights)}
    one = lambda start, peaks: trained_towards_targets(config, Params({}, start), peaks)
    got = fast_jit(jax.vmap(one))(starts, peaks)
    for run in range(2):
        own = replace(config, lr=rates[run], weights_lr=weights[run])
        mine = lambda tree, run=run: jax.tree.map(lambda leaf: np.asarray(leaf)[run], tree)
        want = fast_jit(lambda start, own=own: trained_towards_targets(own, Params({}, start)))(mine(starts))
        close(mine(got), want, 1e-6)
        assert not_orthonormal(mine(got)["reft"]["block"]["R"][0]) < 1e-5
        assert np.all(joint_overlap(JOINT, mine(got)) <= 1e-6)
