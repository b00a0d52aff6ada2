"""What trains, at which rate, and what does not."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiny import identical, random_steering, slot_of

from jaxsteer import OptimConfig, Params, count_parameters, make_optimizer, merge, param_labels, split
from jaxsteer.optim import count_trained, learning_rates, make_schedule

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


def test_labels(params, plan):
    labels = param_labels(params, plan, frozen=("still",))
    assert set(jax.tree.leaves(labels.base)) == {"frozen"}
    assert labels.steering["lora"]["mlp.down"] == {"A": "weights", "B": "weights"}
    assert labels.steering["steer"]["block"] == {"D": "activations", "U": "activations"}
    assert labels.steering["still"]["mlp"] == {"v": "frozen"}
    assert set(jax.tree.leaves(param_labels(params, plan, train_base=True).base)) == {"weights"}


def test_split_and_merge(params, plan):
    labels = param_labels(params, plan, frozen=("still",))
    trained, frozen = split(params, labels)
    assert not jax.tree.leaves(trained.base)
    assert not jax.tree.leaves(trained.steering["still"])
    assert len(jax.tree.leaves(trained)) == 4
    identical(merge(trained, frozen), params)
    assert count_trained(params, labels) == count_parameters(trained) > 0


def test_each_group_moves_at_its_own_rate_and_frozen_slots_do_not(params, plan):
    labels = param_labels(params, plan, frozen=("still",))
    trained, frozen = split(params, labels)
    config = OptimConfig(lr=1e-2, weights_lr=1e-4, **PLAIN)
    tx = make_optimizer(config, labels, 10)
    state = tx.init(trained)
    grads = gradients(trained)
    updates, state = tx.update(grads, state, trained)
    moved = merge(optax.apply_updates(trained, updates), frozen)
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
    trained, _ = split(params, labels)
    state = make_optimizer(OptimConfig(), labels, 10).init(trained)
    big = [leaf for leaf in jax.tree.leaves(state) if leaf.ndim]
    assert sum(leaf.size for leaf in big) == 2 * count_parameters(trained)  # two moments
    assert {leaf.dtype for leaf in big} == {jnp.dtype("float32")}


@pytest.mark.parametrize("scale", [1e-3, 10.0])
def test_clip_is_over_both_groups_together(scale, params, plan):
    labels = param_labels(params, plan)
    trained, _ = split(params, labels)
    config = OptimConfig(**(PLAIN | {"clip": 2.0}))
    tx = make_optimizer(config, labels, 10)
    grads = gradients(trained, scale)
    norm = optax.tree.norm(grads)
    assert (norm > 2) == (scale == 10.0)
    _, state = tx.update(grads, tx.init(trained), trained)
    moments = [leaf for path, leaf in jax.tree_util.tree_leaves_with_path(state) if ".mu" in jax.tree_util.keystr(path)]
    assert len(moments) == len(jax.tree.leaves(trained))
    # The first moment after one step is (1 − b1) × the clipped gradient.
    np.testing.assert_allclose(optax.tree.norm(moments) / (1 - config.b1), min(norm, 2.0), rtol=1e-5)


def test_weight_decay_is_decoupled(params, plan):
    labels = param_labels(params, plan)
    trained, _ = split(params, labels)
    tx = make_optimizer(OptimConfig(lr=0.1, weight_decay=0.5, **PLAIN), labels, 10)
    zeros = jax.tree.map(jnp.zeros_like, trained)
    updates, _ = tx.update(zeros, tx.init(trained), trained)
    for update, value in zip(jax.tree.leaves(updates), jax.tree.leaves(trained), strict=True):
        np.testing.assert_allclose(update, -0.05 * value, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize(
    ("kind", "halfway", "end"), [("constant", 1.0, 1.0), ("linear", 0.5, 0.0), ("cosine", 0.5, 0.0)]
)
def test_schedules(kind, halfway, end):
    rate = make_schedule(OptimConfig(schedule=kind, warmup=0.2), 3.0, 100)
    got = [float(rate(step)) for step in (0, 10, 20, 60, 100)]
    np.testing.assert_allclose(got, [0, 1.5, 3, 3 * halfway, 3 * end], atol=1e-6)
    cosine = 0.5 * (1 + np.cos(np.pi / 4))
    want = {"constant": 1.0, "linear": 0.75, "cosine": cosine}[kind]
    np.testing.assert_allclose(float(rate(40)), 3 * want, rtol=1e-5)
    assert float(make_schedule(OptimConfig(schedule=kind, warmup=0.0), 3.0, 100)(0)) == 3


def test_rates_for_the_log():
    config = OptimConfig(lr=1e-2, weights_lr=1e-3, schedule="linear", warmup=0.0)
    got = learning_rates(config, jnp.array(5, jnp.int32), 10)
    np.testing.assert_allclose([got["activations"], got["weights"]], [5e-3, 5e-4], rtol=1e-5)
    assert learning_rates(OptimConfig(), jnp.array(5, jnp.int32), 10)["weights"] > 0


@pytest.mark.parametrize(
    ("settings", "culprit"),
    [
        ({"lr": 0.0}, "optim.lr"),
        ({"lr": float("nan")}, "optim.lr"),
        ({"weights_lr": -1.0}, "optim.weights_lr"),
        ({"warmup": 1.0}, "optim.warmup"),
        ({"warmup": -0.1}, "optim.warmup"),
        ({"clip": 0.0}, "optim.clip"),
        ({"schedule": "sawtooth"}, "sawtooth"),
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
