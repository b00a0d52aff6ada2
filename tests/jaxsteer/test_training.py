"""The training step: gradient accumulation, penalties, no cost for a frozen base, and that every method learns."""

from dataclasses import dataclass
from functools import cache, partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiny import all_methods, close, fast_jit, product_shapes, random_steering, sites_of, slot_of, turn

from jaxsteer import (
    METHODS,
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
    make_batch,
    make_optimizer,
    make_train_step,
    mean_loss,
    param_labels,
    partition,
    train_step,
)
from jaxsteer.steering import steering_shapes


@dataclass(frozen=True)
class Penalised(NonlinearSteering):
    """With a penalty that grows with the step."""

    def penalty(self, p, step):
        return (1 + step.astype(jnp.float32)) * jnp.sum(p["U"] ** 2)


@cache
def optimizer_and_step(model, tx):
    """The optimizer, and the compiled step: tests of one model and one optimizer share it."""
    if isinstance(tx, OptimConfig):
        base = jax.eval_shape(partial(init_base, model.config), jax.random.key(0))
        params = Params(base, steering_shapes(model.plan, model.config))
        tx = make_optimizer(tx, param_labels(params, model.plan, train_base=model.train_base), 200, model.plan)
    return tx, fast_jit(partial(train_step, model=model, tx=tx))


def start(model, base, steering, tx):
    params = Params(base, steering)
    trained, frozen = partition(params, param_labels(params, model.plan, train_base=model.train_base))
    tx, step = optimizer_and_step(model, tx)
    return init_state(trained, tx, jax.random.key(0)), frozen, step


LEARN = OptimConfig(lr=1e-2, warmup=0.05)


def uneven(vocab):
    """Eight rows with 0, 1, 2, ... 7 supervised tokens of random weights."""
    draw = np.random.default_rng(0)
    weights = draw.uniform(0.5, 2, (8, 9)) * (np.arange(9)[::-1] < np.arange(8)[:, None])
    return make_batch(draw.integers(3, vocab, (8, 9)), None, weights)


# ---- accumulation and penalties


def test_accumulated_microbatches_are_one_big_batch(tiny_config, tiny_base):
    plan = (Slot("s", Penalised(rank=2), ("block",)),)
    model, steering = Model(tiny_config, plan), random_steering(plan, tiny_config)
    big = uneven(tiny_config.vocab_size)
    micro = jax.tree.map(lambda field: field.reshape(4, 2, 9), big)
    state, frozen, step = start(model, tiny_base, steering, optax.sgd(1.0))
    (one, metrics), (four, accumulated) = step(state, big, frozen), step(state, micro, frozen)
    moved = lambda new: jax.tree.map(np.subtract, new.params, state.params)
    scale = max(np.abs(leaf).max() for leaf in jax.tree.leaves(moved(one)))
    for a, b in zip(jax.tree.leaves(moved(four)), jax.tree.leaves(moved(one)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6 * scale)
    assert metrics.facts == {}
    for name in set(metrics._fields) - {"facts"}:
        np.testing.assert_allclose(getattr(accumulated, name), getattr(metrics, name), rtol=1e-6, err_msg=name)

    # The step is the plain gradient of mean loss + penalty, the penalty counted once.
    def whole(steering):
        penalty = jnp.sum(steering["s"]["block"]["U"] ** 2)
        return mean_loss(model, tiny_base, steering, big) + penalty, penalty

    (value, penalty), grads = fast_jit(jax.value_and_grad(whole, has_aux=True))(steering)
    close(moved(four).steering, jax.tree.map(np.negative, grads), 1e-5)
    np.testing.assert_allclose(accumulated.loss + accumulated.penalty, value, rtol=1e-5)
    np.testing.assert_allclose(accumulated.penalty, penalty, rtol=1e-6)
    np.testing.assert_allclose(accumulated.grad_norm, optax.tree.norm(grads), rtol=1e-5)
    np.testing.assert_allclose(accumulated.supervised, np.sum(big.weights[:, 1:]), rtol=1e-6)
    assert accumulated.tokens == 72
    # The penalty of the next step gets that step's number.
    assert four.step == 1
    _, second = step(four, micro, frozen)
    u = four.params.steering["s"]["block"]["U"]
    np.testing.assert_allclose(second.penalty, 2 * np.sum(np.square(u)), rtol=1e-5)


def test_a_batch_with_nothing_to_learn_changes_nothing(tiny_config, tiny_base):
    plan = (slot_of("nonlinear", tiny_config, sites=("block",)),)
    state, frozen, step = start(Model(tiny_config, plan), tiny_base, random_steering(plan, tiny_config), LEARN)
    new, metrics = step(state, make_batch(np.ones((16, 12), int)), frozen)
    assert metrics.loss == 0
    assert metrics.supervised == 0
    close(new.params, state.params, 0)


def test_the_compiled_step_donates_the_state_and_returns_one_like_it(tiny_config, tiny_base):
    plan = (slot_of("nonlinear", tiny_config, sites=("block",)),)
    model = Model(tiny_config, plan)
    state, frozen, _ = start(model, tiny_base, random_steering(plan, tiny_config), LEARN)
    tx, _ = optimizer_and_step(model, LEARN)
    lowered = make_train_step(model, tx).lower(state, planted(0), frozen)
    (given, *others), _ = lowered.args_info
    assert all(info.donated for info in jax.tree.leaves(given))
    assert not any(info.donated for info in jax.tree.leaves(others))
    new, metrics = lowered.out_info
    chex.assert_trees_all_equal_shapes_and_dtypes(new, state)
    chex.assert_shape(metrics._replace(overlap=metrics.loss), ())
    chex.assert_shape(metrics.overlap, (0,))


# ---- what a frozen base does not cost

DISTINCT = ModelConfig(vocab_size=53, width=28, layers=5, heads=2, kv_heads=1, head_dim=10, mlp_width=44)
KERNELS = {(28, 20), (28, 10), (20, 28), (28, 44), (44, 28), (28, 53)}


def lowered_step(train_base):
    plan = all_methods(DISTINCT, few=True, layers=(3, 4))
    model = Model(DISTINCT, plan, train_base=train_base)
    base = jax.eval_shape(lambda: init_base(DISTINCT, jax.random.key(0)))
    params = Params(base, steering_shapes(plan, DISTINCT))
    trained, frozen = partition(params, param_labels(params, plan, train_base=train_base))
    tx = optax.adam(1e-3)
    state = jax.eval_shape(
        lambda: init_state(jax.tree.map(lambda s: jnp.zeros(s.shape), trained), tx, jax.random.key(0))
    )
    batch = jax.eval_shape(lambda: make_batch(np.ones((3, 17), int)))
    return jax.jit(partial(train_step, model=model, tx=tx)), state, batch, frozen


def test_no_gradient_of_a_frozen_weight_is_computed():
    kernels = {tuple(sorted(shape)) for shape in KERNELS}
    products = lambda text: {tuple(sorted(shape)) for shape in product_shapes(text, over=16)}  # the largest rank
    step, *args = lowered_step(train_base=True)
    assert kernels <= products(step.lower(*args).as_text())  # the check finds them where they exist
    step, *args = lowered_step(train_base=False)
    assert not kernels & products(step.lower(*args).as_text())


def scans(jaxpr):
    """(length, reverse) of every scan, at any depth."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "scan":
            yield equation.params["length"], equation.params["reverse"]
        for value in jax.tree.leaves(tuple(equation.params.values()), is_leaf=lambda v: hasattr(v, "eqns")):
            if hasattr(value, "eqns"):
                yield from scans(value)


@pytest.mark.parametrize(("layers", "backward"), [((5, 6), 2), ((4, 6), 3), (None, 7)])
def test_layers_below_the_first_steered_one_have_no_backward_pass(layers, backward):
    config = ModelConfig(vocab_size=11, width=8, layers=7, heads=2, kv_heads=1, head_dim=4, mlp_width=8)
    plan = (Slot("s", NonlinearSteering(rank=2), ("block",), layers),)
    model = Model(config, plan)
    base = jax.eval_shape(lambda: init_base(config, jax.random.key(0)))
    steering = steering_shapes(plan, config)
    batch = jax.eval_shape(lambda: make_batch(np.ones((1, 13), int)))
    grad = jax.make_jaxpr(jax.grad(lambda s, base, batch: mean_loss(model, base, s, batch)))
    found = set(scans(grad(steering, base, batch).jaxpr))
    # Scans of length 1 are not over layers, but over rows of attention and chunks of the loss.
    assert {length for length, reverse in found if reverse and length > 1} == {backward}
    if backward < 7:
        assert (7 - backward, False) in found


# ---- learning

STEPS = 50
RULE = np.random.default_rng(3).integers(3, 11, 61)  # any of 61 tokens -> one of eight


@cache
def planted(seed, rows=16):
    """Prompts of four random tokens; every supervised token follows from the one before by a fixed rule."""
    draw = np.random.default_rng(seed)
    tokens = np.zeros((rows, 12), np.int64)
    tokens[:, :4] = draw.integers(3, 61, (rows, 4))
    for t in range(4, 12):
        # Every second token is random, so that the rule is applied to all its arguments.
        tokens[:, t] = RULE[tokens[:, t - 1]] if t % 2 == 0 else draw.integers(3, 61, rows)
    weights = np.zeros((rows, 12), np.float32)
    weights[:, 4::2] = 1
    return make_batch(tokens, None, weights)


evaluate = fast_jit(mean_loss, static_argnums=0)


def learn(model, base, optim=LEARN):
    """The trained trees, the final state, and the loss of each step."""
    steering = init_steering(model.plan, model.config, jax.random.key(1))
    state, frozen, step = start(model, base, steering, optim)
    losses = []
    for i in range(STEPS):
        state, out = step(state, planted(i), frozen)
        losses.append(float(out.loss))
    return combine(state.params, frozen), state, losses


def held_out_losses(model, base, whole):
    """Held-out losses of the base model, and after training."""
    held_out = planted(10_000, 64)
    off = jax.tree.map(np.zeros_like, whole.steering)  # the base model, by the same program
    before = evaluate(model, base, off, held_out)
    return float(before), float(evaluate(model, whole.base, whole.steering, held_out))


SITES = ("attn.heads", "block", "attn.o", "mlp.down")
FASTER = {"lofit_scale": 3.0}
"""Factors on the learning rate: the scale of a head has to move further than a vector in the residual stream."""


@pytest.fixture(scope="module")
def learn_alone(tiny_config, tiny_base):
    """Train one method in a plan of all methods, with the updates of the others zeroed: one program serves all."""
    at = {name: [site for site in sites_of(METHODS[name](), tiny_config) if site in SITES] for name in METHODS}
    plan = tuple(slot_of(name, tiny_config, slot=name, sites=tuple(at[name])) for name in METHODS)
    fresh = init_steering(plan, tiny_config, jax.random.key(1), base=tiny_base)
    labels = param_labels(Params(tiny_base, fresh), plan)
    model = Model(tiny_config, plan)
    tx = make_optimizer(OptimConfig(lr=2e-2, warmup=0.05), labels, 200, plan)

    def scaled(factors):
        return optax.stateless(lambda updates, _: jax.tree.map(jnp.multiply, updates, factors))

    @jax.jit  # not the fast one: it runs often enough
    def step(state, batch, frozen, factors):
        return train_step(state, batch, frozen, model=model, tx=optax.chain(tx, scaled(factors)))[0]

    def learn(name):
        trained, frozen = partition(Params(tiny_base, turn(fresh, name)), labels)
        factor = FASTER.get(name, 1.0)
        on = lambda slot: jax.tree.map(lambda _: np.float32(factor * (slot == name)), trained.steering[slot])
        factors = trained._replace(steering={slot: on(slot) for slot in trained.steering})
        state = init_state(trained, optax.chain(tx, scaled(factors)), jax.random.key(0))
        for i in range(STEPS):
            state = step(state, planted(i), frozen, factors)
        whole = combine(state.params, frozen)
        return *held_out_losses(model, tiny_base, whole), whole.steering[name], fresh[name]

    return learn


@pytest.mark.xdist_group("learning")  # they share a compiled program
@pytest.mark.parametrize("name", METHODS)
def test_every_method_learns_and_it_holds_on_unseen_rows(name, learn_alone):
    before, after, steering, fresh = learn_alone(name)
    assert after < 0.8 * before, (before, after)
    method = METHODS[name]()
    for site, p in steering.items():
        for constant in method.constants:
            np.testing.assert_array_equal(p[constant], fresh[site][constant])
        for rows in method.orthonormal:
            gram = jnp.einsum("lrd,lsd->lrs", p[rows], p[rows])
            np.testing.assert_allclose(gram, np.broadcast_to(np.eye(8), gram.shape), atol=1e-5)
            assert np.abs(p[rows] - fresh[site][rows]).max() > 0.1


def test_full_fine_tuning_learns(tiny_config, tiny_base):
    model = Model(tiny_config, train_base=True)
    whole, _, _ = learn(model, tiny_base, OptimConfig(lr=3e-3, warmup=0.05))
    before, after = held_out_losses(model, tiny_base, whole)
    assert after < 0.8 * before, (before, after)


def test_bf16_base_with_fp32_steering(tiny_config, tiny_base):
    model = Model(tiny_config, (slot_of("nonlinear", tiny_config, sites=("block",)),))
    losses = {}
    for dtype in (jnp.float32, jnp.bfloat16):
        base = jax.tree.map(lambda leaf, d=dtype: leaf.astype(d), tiny_base)
        _, state, losses[dtype] = learn(model, base)
        kept = [x for x in jax.tree.leaves((state.params, state.opt_state)) if jnp.issubdtype(x.dtype, jnp.floating)]
        assert {leaf.dtype for leaf in kept} == {jnp.dtype("float32")}
    fp32, bf16 = (np.mean(losses[dtype][-5:]) for dtype in (jnp.float32, jnp.bfloat16))
    assert abs(bf16 - fp32) < 0.02 * fp32
    assert fp32 < 0.9 * losses[jnp.float32][0]
