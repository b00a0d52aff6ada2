"""Predictions against the loss itself: gradients at sites, what a shift of each kind gains, the aligned start."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_conversion import token_batches
from test_oracle import fine_tuned
from tiny import close, fast_jit, run

from jaxsteer import FixedVector, LinearSteering, Model, Slot, init_steering, mean_loss
from jaxsteer.models.transformer import Network
from jaxsteer.theory import fits
from jaxsteer.theory.predict import STREAM_SITES, aligned_start, gradient_factors, promise, site_gradients
from jaxsteer.theory.shares import SHARED_SITES, examples_of, share_intervals, site_shares

pytestmark = pytest.mark.xdist_group("predict")  # the tests share compiled programs

gradients_at = fast_jit(site_gradients, static_argnames="sites")

BLOCK = (Slot("s", LinearSteering(rank=2), ("block",)),)


@pytest.fixture(scope="module")
def base(tiny_config, tiny_base):
    return Network(Model(tiny_config), tiny_base, {})


@pytest.fixture(scope="module")
def batches(tiny_config):
    return token_batches(tiny_config.vocab_size, 3)


@pytest.fixture(scope="module")
def factors(base, batches):
    return gradient_factors(base, batches, ("block", "mlp"))


def test_gradients_are_those_of_steering(base, batches):
    """The sum over the tokens is a fixed vector's gradient; with y it is a linear map's."""
    values, gradients = gradients_at(base, batches[0], STREAM_SITES)
    plan = (Slot("f", FixedVector(), STREAM_SITES), Slot("l", LinearSteering(rank=32), STREAM_SITES))
    fresh = init_steering(plan, base.model.config, jax.random.key(0))
    eye = jnp.broadcast_to(jnp.eye(32)[None], (4, 32, 32))
    fresh["l"] = {site: {"D": eye, "U": 0 * eye} for site in STREAM_SITES}
    grads = fast_jit(jax.grad(lambda s: mean_loss(Model(base.model.config, plan), base.base, s, batches[0])))(fresh)
    for site in STREAM_SITES:
        close(jnp.sum(gradients[site], axis=(1, 2)), grads["f"][site]["v"], 1e-4)
        close(jnp.einsum("lbtd,lbte->lde", gradients[site], values[site]), grads["l"][site]["U"], 1e-4)


def test_the_promise_is_the_best_gain_of_its_kind(base, batches):
    """Along the best shift of norm ε the loss falls by ε √promise, for a fixed vector and for a map of rank 2."""
    batch, layer = batches[0], 2
    factor = gradient_factors(base, [batch], ("block", "mlp"))["block"]
    found = promise(factor, ridge=0.0)
    y = np.asarray(gradients_at(base, batch, STREAM_SITES)[0]["block"][layer])
    one = jax.tree.map(lambda leaf: leaf[layer], factor)
    vector, best = fits.mean_shift(one).bias, fits.fit(one, "linear", 2, 0.0)
    # Both kinds as slots of one plan: with nothing written yet, neither sees the other.
    methods = {"fixed": FixedVector(), "linear": LinearSteering(rank=2)}
    plan = tuple(Slot(name, method, ("block",), (layer,)) for name, method in methods.items())

    def loss(by):
        fixed, linear = {"v": by[0] * vector}, {"D": best.read, "U": by[1] * best.write}
        params = {"fixed": {"block": fixed}, "linear": {"block": linear}}
        params = jax.tree.map(lambda leaf: leaf[None], params)
        return mean_loss(Model(base.model.config, plan), base.base, params, batch)

    slopes = fast_jit(jax.grad(loss))(jnp.zeros(2))
    shifts = np.broadcast_to(vector, y.shape), np.asarray(best(y))
    gains = found.fixed[layer], found.ranks[layer, 1]
    for slope, shift, gain in zip(slopes, shifts, gains, strict=True):
        norm = np.sqrt(np.sum(shift[np.asarray(batch.segments) > 0] ** 2))
        np.testing.assert_allclose(-slope / norm, np.sqrt(gain), rtol=1e-2)
    assert np.all(np.asarray(found.fixed) < found.energy)
    assert np.all(np.diff(found.ranks, axis=1) > -1e-6)
    assert np.all(np.asarray(found.ranks)[:, -1] <= np.asarray(found.energy) * (1 + 1e-5))


def test_an_aligned_start_is_the_base_and_falls_faster(base, batches, factors):
    model = Model(base.model.config, BLOCK)
    fresh = init_steering(BLOCK, base.model.config, jax.random.key(0))
    aligned = aligned_start(BLOCK, fresh, factors)
    assert not np.any(aligned["s"]["block"]["U"])
    close(*(jnp.linalg.norm(tree["s"]["block"]["D"], axis=-1) for tree in (aligned, fresh)), 1e-5)
    hidden = lambda tree: run(model, base.base, tree, batches[0]).hidden
    np.testing.assert_array_equal(hidden(aligned), hidden(fresh))
    slope = fast_jit(jax.grad(lambda tree, batch: mean_loss(model, base.base, tree, batch)))
    slopes = lambda tree: sum(np.asarray(slope(tree, batch)["s"]["block"]["U"]) for batch in batches) / 3
    steepness = [np.linalg.norm(slopes(tree)) for tree in (aligned, fresh)]
    assert steepness[0] > 1.3 * steepness[1]


def test_a_site_explains_what_goes_through_it(tiny_config, tiny_base, base, batches):
    """Only the MLP's weights are changed: the MLP explains it all, attention nothing; and the other way."""
    shares = fast_jit(site_shares, static_argnames=("sites", "stream"))
    tuned = fine_tuned(tiny_config, tiny_base)

    def only(part):
        blocks = {**base.base["blocks"], part: tuned.base["blocks"][part]}
        return Network(base.model, base.base | {"blocks": blocks}, {})

    of = lambda network, stream="own": share_intervals(
        *examples_of(shares(base, network, batches[0], SHARED_SITES, stream))
    )
    share, low, high = of(only("mlp"))
    attn, before, mlp, block = share
    close(mlp, np.ones(4), 1e-3)
    close(block, np.ones(4), 1e-3)
    close(attn, np.zeros(4), 1e-3)
    close(before, np.zeros(4), 1e-3)
    attn, before, mlp, block = of(only("attn"))[0]
    close(attn, np.ones(4), 1e-3)
    assert np.all(mlp < 0.9)
    share, low, high = of(tuned)
    assert np.all((low <= share + 1e-6) & (share <= high + 1e-6))
    assert np.all(high[2] > low[2])
    # Of the whole shift, nothing but the block's output makes up for what came from below.
    whole = of(tuned, "whole")[0]
    assert np.all(whole[2, 1:] < share[2, 1:])
    close(whole[3], np.ones(4), 1e-3)


def test_an_interval_shrinks_with_the_examples():
    draw = np.random.default_rng(0)
    whole = draw.uniform(1, 2, (1, 400))
    left = whole[None] * draw.uniform(0.2, 0.6, (1, 1, 400))
    share, low, high = share_intervals(left, whole)
    few = share_intervals(left[..., :25], whole[..., :25])
    np.testing.assert_allclose(share, 0.6, atol=0.03)
    assert low < share < high
    assert (few[2] - few[1])[0, 0] > 2.5 * (high - low)[0, 0]


def test_what_cannot_be_predicted_is_refused(base, batches, factors):
    with pytest.raises(ValueError, match=r"no model has a site 'mlp.experts'"):
        site_gradients(base, batches[0], ("mlp.experts",))
    with pytest.raises(ValueError, match=r"'attn.heads' has several vectors"):
        gradient_factors(base, batches, ("attn.heads",))
    with pytest.raises(ValueError, match="at least one batch"):
        gradient_factors(base, [])
    plan = (Slot("f", FixedVector(), ("block",)),)
    with pytest.raises(ValueError, match=r"nothing to align: no slot of \['f'\].*block"):
        aligned_start(plan, init_steering(plan, base.model.config, jax.random.key(0)), factors)
    with pytest.raises(ValueError, match="stream must be own or whole, got 'both'"):
        site_shares(base, base, batches[0], stream="both")
    with pytest.raises(ValueError, match="no examples"):
        share_intervals(np.zeros((1, 1, 0)), np.zeros((1, 0)))
