"""Derivatives of the whole model: against finite differences in fp64, forward against reverse mode, vmap over seeds."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import all_methods, close, fast_jit, random_steering, slot_of, supervised_batch, turn

from jaxsteer import METHODS, Model, ModelConfig, forward, init_base, init_steering, mean_loss
from jaxsteer.interventions import DoRA
from jaxsteer.types import Context

pytestmark = pytest.mark.xdist_group("derivatives")  # the tests share compiled programs

SMALL = ModelConfig(vocab_size=13, width=8, layers=2, heads=2, kv_heads=1, head_dim=4, mlp_width=10)


def doubled(tree):
    return jax.tree.map(lambda leaf: jnp.asarray(np.asarray(leaf), jnp.float64), tree)


@pytest.fixture(scope="module")
def base():
    return jax.tree.map(lambda leaf: leaf * 2, fast_jit(init_base, static_argnums=0)(SMALL, jax.random.key(0)))


def direction(tree, seed=0):
    draw = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: draw.standard_normal(leaf.shape).astype(leaf.dtype), tree)


def moved(tree, tangent, by):
    return jax.tree.map(lambda a, b: np.asarray(a) + by * np.asarray(b), tree, tangent)


def inner(a, b):
    return sum(float(np.vdot(x, y)) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


@pytest.fixture(scope="module")
def in_doubles(base):
    """The loss and gradient of a plan of all methods in fp64, and a point to take them at."""
    plan, batch = all_methods(SMALL), supervised_batch(13, 2, 6, 2)
    with jax.enable_x64(True):
        base, steering = doubled((base, random_steering(plan, SMALL, scale=0.3)))
        loss_and_grads = fast_jit(jax.value_and_grad(lambda s: mean_loss(Model(SMALL, plan), base, s, batch)))
        return loss_and_grads, steering


@pytest.mark.parametrize("name", METHODS)
def test_gradient_is_the_finite_difference(name, in_doubles):
    loss_and_grads, steering = in_doubles
    loss = lambda steering: loss_and_grads(steering)[0]
    with jax.enable_x64(True):
        steering = turn(steering, name)
        _, grads = loss_and_grads(steering)
        assert {leaf.dtype for leaf in jax.tree.leaves(grads)} == {jnp.dtype("float64")}
        for seed in range(2):
            tangent = turn(direction(steering, seed), name)
            if name == "dora":  # its norm is a constant for the other gradients, see the test below
                tangent["dora"] = {site: p | {"A": 0 * p["A"], "B": 0 * p["B"]} for site, p in tangent["dora"].items()}
            difference = (loss(moved(steering, tangent, 1e-6)) - loss(moved(steering, tangent, -1e-6))) / 2e-6
            assert abs(difference) > 1e-4
            np.testing.assert_allclose(inner(grads, tangent), difference, rtol=1e-5, atol=1e-8)


def test_dora_takes_its_norm_as_a_constant():
    """The gradient is that of (‖W‖ + m) / n ⊙ (W + s B A) x with n fixed."""
    method = DoRA(rank=2, alpha=3.0)
    draw = np.random.default_rng(0)
    array = lambda *shape: jnp.asarray(draw.standard_normal(shape, np.float32))
    w, x, toward = array(5, 4), array(3, 5), array(3, 4)
    p = {"A": array(2, 5), "B": array(4, 2), "m": array(4)}
    whole = lambda p: w + 1.5 * (p["B"] @ p["A"]).T
    n = jnp.linalg.norm(whole(p), axis=0)

    def by_hand(p):
        gain = (jnp.linalg.norm(w, axis=0) + p["m"]) / n
        return jnp.sum(toward * (x @ (gain[None] * whole(p))))

    ours = lambda p: jnp.sum(toward * method.apply(p, x, x @ w, Context(jnp.array(0), w)))
    value_and_grads = fast_jit(lambda p: (jax.value_and_grad(ours)(p), jax.value_and_grad(by_hand)(p)))
    close(*value_and_grads(p), 1e-5)


def test_full_fine_tuning_gradient_is_the_finite_difference(base):
    """For one entry of each leaf: embedding, norms, attention, MLP and head."""
    model, batch = Model(SMALL, train_base=True), supervised_batch(13, 2, 6, 2)
    with jax.enable_x64(True):
        base = doubled(base)
        loss_and_grads = fast_jit(jax.value_and_grad(lambda b: mean_loss(model, b, {}, batch)))
        loss, (_, grads) = lambda b: loss_and_grads(b)[0], loss_and_grads(base)
        leaves, tree = jax.tree.flatten(base)
        for i, (path, grad) in enumerate(jax.tree_util.tree_leaves_with_path(grads)):
            at = np.unravel_index(np.argmax(np.abs(grad)), grad.shape)  # an entry that matters

            def bump(by, i=i, at=at):
                bumped = np.array(leaves[i])
                bumped[at] += by
                return loss(jax.tree.unflatten(tree, [*leaves[:i], bumped, *leaves[i + 1 :]]))

            difference = (bump(1e-6) - bump(-1e-6)) / 2e-6  # the embedding is small: its curvature shows at 1e-5
            assert abs(difference) > 1e-6, path
            np.testing.assert_allclose(grad[at], difference, rtol=1e-5, err_msg=jax.tree_util.keystr(path))


@pytest.mark.parametrize("layers", [None, (1,)])
def test_jvp_is_the_finite_difference_and_the_transposed_vjp(layers, base):
    model = Model(SMALL, (slot_of("nonlinear", SMALL, layers=layers),))
    steering = random_steering(model.plan, SMALL, scale=0.3)
    batch = supervised_batch(13, 2, 6, 2)
    with jax.enable_x64(True):
        base, steering = doubled((base, steering))
        f = lambda b, s: forward(model, b, s, batch).hidden
        primal, tangent = (base, steering), (direction(base), direction(steering))
        forwards = fast_jit(lambda p, t: jax.jvp(f, p, t))
        out, out_dot = forwards(primal, tangent)
        plain = lambda p: np.asarray(forwards(p, tangent)[0])
        difference = (plain(moved(primal, tangent, 1e-6)) - plain(moved(primal, tangent, -1e-6))) / 2e-6
        np.testing.assert_allclose(out_dot, difference, rtol=1e-5, atol=1e-5 * np.abs(difference).max())
        # ⟨w, J t⟩ = ⟨Jᵀ w, t⟩
        cotangent = direction(out, 5)
        if layers is None:
            pulled = fast_jit(lambda p, w: jax.vjp(f, *p)[1](w))(primal, cotangent)
            np.testing.assert_allclose(inner(cotangent, out_dot), inner(pulled, tangent), rtol=1e-9)
        f = lambda s: forward(model, base, s, batch).hidden
        both = fast_jit(lambda p, t, w: (jax.jvp(f, (p,), (t,))[1], jax.vjp(f, p)[1](w)[0]))
        out_dot, pulled = both(steering, tangent[1], cotangent)
        np.testing.assert_allclose(inner(cotangent, out_dot), inner(pulled, tangent[1]), rtol=1e-9)


def test_vmap_over_seeds_is_the_loop(base):
    model, batch = Model(SMALL, all_methods(SMALL, few=True)), supervised_batch(13, 2, 6, 2)
    steering = random_steering(model.plan, SMALL, scale=0.3)
    keys = jax.random.split(jax.random.key(0), 3)

    def one(key):
        fresh = init_steering(model.plan, SMALL, key, base=base)
        shifted = jax.tree.map(jnp.add, fresh, steering)  # fresh parameters alone would steer little
        return fresh, forward(model, base, shifted, batch).hidden

    stacked, hidden = fast_jit(jax.vmap(one))(keys)
    alone = fast_jit(one)
    for i, key in enumerate(keys):
        fresh, want = alone(key)
        close(jax.tree.map(lambda leaf, i=i: np.asarray(leaf)[i], stacked), fresh, 0)
        close(np.asarray(hidden)[i], want, 1e-5)
