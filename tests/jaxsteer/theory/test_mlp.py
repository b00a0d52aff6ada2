"""The closed forms of the first-order equivalence, against jvps of the MLP and of whole models."""

from dataclasses import replace
from functools import partial

import jax
import numpy as np
import pytest
from tiny import fast_jit, random_steering, run, slot_of, supervised_batch

from jaxsteer import Model, Params
from jaxsteer.interventions.low_rank import ACTIVATION_FUNCTIONS
from jaxsteer.models.layers import ACTIVATIONS
from jaxsteer.models.transformer import init_base
from jaxsteer.theory import (
    adapter_shift,
    down_shift,
    first_order,
    gate_shift,
    gated_mlp,
    mlp_shift,
    pre_mlp_shift,
    up_shift,
)
from jaxsteer.theory.mlp import SLOPES, layer_mlp

pytestmark = pytest.mark.xdist_group("theory_mlp")

LAYER = 2
first = fast_jit(first_order, static_argnames=("model", "sites"))


def near(got, want):
    """To 1e-5 of the largest value."""
    got, want = np.asarray(got), np.asarray(want)
    assert np.abs(want).max() > 1e-3
    np.testing.assert_allclose(got, want, 1e-5, 1e-5 * np.abs(want).max())


def noise(tree, seed, scale=0.1):
    draw = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: (scale * draw.standard_normal(leaf.shape)).astype(leaf.dtype), tree)


@pytest.fixture(scope="module", params=["silu", "gelu_tanh with biases"])
def layer(request, tiny_config):
    """(activation, weights of one MLP, input)."""
    config = tiny_config
    if request.param != "silu":
        config = replace(config, activation="gelu_tanh", mlp_bias=True)
    shapes = jax.eval_shape(partial(init_base, config), jax.random.key(0))
    weights = layer_mlp(noise(shapes, 1, 0.3), LAYER)
    assert ("bias" in weights["up"]) == config.mlp_bias
    x = np.random.default_rng(2).standard_normal((2, 5, config.width), np.float32)
    return config.activation, weights, x


@pytest.mark.parametrize(("name", "form"), [("down", down_shift), ("gate", gate_shift), ("up", up_shift)])
def test_weight_updates(name, form, layer):
    activation, weights, x = layer
    delta = {name: noise(weights[name], 3)}

    def twin(weights, delta, x):
        f = lambda part: gated_mlp({**weights, name: part}, x, activation)
        return jax.jvp(f, (weights[name],), (delta[name],))[1]

    near(fast_jit(form, static_argnums=3)(weights, delta, x, activation), fast_jit(twin)(weights, delta, x))


def test_all_weights_and_steering_in_front(layer):
    activation, weights, x = layer
    delta, dx = noise(weights, 4), noise(x, 5)
    twin = lambda w, x, dw, dx: jax.jvp(lambda w, x: gated_mlp(w, x, activation), (w, x), (dw, dx))[1]
    zeros = jax.tree.map(np.zeros_like, weights)
    twin = fast_jit(twin)
    near(fast_jit(mlp_shift, static_argnums=3)(weights, delta, x, activation), twin(weights, x, delta, 0 * x))
    near(fast_jit(pre_mlp_shift, static_argnums=3)(weights, dx, x, activation), twin(weights, x, zeros, dx))


def test_slopes_are_the_derivatives_of_the_activations():
    a = np.linspace(-4, 4, 31, dtype=np.float32) + np.float32(1e-3)
    functions = ACTIVATIONS | ACTIVATION_FUNCTIONS
    assert set(functions) == set(SLOPES)
    slopes = fast_jit(lambda a: {name: slope(a) for name, slope in SLOPES.items()})(a)
    twins = fast_jit(lambda a: {name: jax.vmap(jax.grad(f))(a) for name, f in functions.items()})(a)
    for name in functions:
        near(slopes[name], twins[name])


def test_updates_of_a_layer_in_a_whole_model(tiny_config, tiny_base):
    """The jvp through the model, at the site of the updated layer, is the closed form on that layer's input."""
    model, batch = Model(tiny_config), supervised_batch(tiny_config.vocab_size)
    delta = jax.tree.map(np.zeros_like, tiny_base["blocks"]["mlp"])
    delta = noise({name: delta[name] for name in ("gate", "up", "down")}, 6)
    delta = jax.tree.map(lambda leaf: np.where(np.arange(4)[:, None, None] == LAYER, leaf, 0), delta)
    x = run(model, tiny_base, {}, batch, capture=("mlp.in",)).taps["mlp.in"][LAYER]
    got = first(model, Params(tiny_base, {}), Params({"blocks": {"mlp": delta}}, {}), batch, ("mlp.down",))
    weights, own = layer_mlp(tiny_base, LAYER), jax.tree.map(lambda leaf: leaf[LAYER], delta)
    near(got["mlp.down"][LAYER], fast_jit(mlp_shift, static_argnums=3)(weights, own, x, "silu"))


@pytest.mark.parametrize("site", ["mlp.in", "mlp"])
def test_steering_of_a_layer_in_a_whole_model(site, tiny_config, tiny_base):
    """Pre-MLP: W_d J(x) δx. Post-MLP: the shift is what the adapter adds."""
    plan = (slot_of("nonlinear", tiny_config, layers=(LAYER,), sites=(site,)),)
    batch, steering = supervised_batch(tiny_config.vocab_size), random_steering(plan, tiny_config, scale=0.3)
    update = noise(steering, 7)
    p, change = (jax.tree.map(lambda leaf: leaf[0], tree["s"][site]) for tree in (steering, update))
    x = run(Model(tiny_config), tiny_base, {}, batch, capture=("mlp.in", "mlp"))
    got = first(Model(tiny_config, plan), Params(tiny_base, steering), Params({}, update), batch, ("mlp",))
    added = fast_jit(adapter_shift, static_argnums=3)(p, change, x.taps[site][LAYER], "silu")
    if site == "mlp.in":
        read = run(Model(tiny_config, plan), tiny_base, steering, batch, capture=(site,)).taps[site][LAYER]
        weights = layer_mlp(tiny_base, LAYER)
        added = fast_jit(pre_mlp_shift, static_argnums=3)(weights, added, read, "silu")
    near(got["mlp"][LAYER], added)


def test_an_unknown_part_is_refused(layer):
    activation, weights, x = layer
    with pytest.raises(ValueError, match="not router"):
        mlp_shift(weights, {"router": weights["up"]}, x, activation)
