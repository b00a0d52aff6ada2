"""Shifts of weight updates: against finite differences, merged weights, and the power at which remainders shrink."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import close, fast_jit, layouts, random_steering, slot_of, supervised_batch

from jaxsteer import LoRA, Model, ModelConfig, Params, Slot, init_base
from jaxsteer.theory import (
    Remainders,
    difference,
    energy,
    explained,
    first_order,
    higher_order,
    merged,
    reach,
    remainders,
    shift,
)
from jaxsteer.theory.shifts import log_slope
from jaxsteer.types import SITES

pytestmark = pytest.mark.xdist_group("theory_shifts")  # the tests share compiled programs

SMALL = ModelConfig(vocab_size=13, width=8, layers=2, heads=2, kv_heads=1, head_dim=4, mlp_width=10)
PLAN = (Slot("lora", LoRA(rank=2), ("attn.q", "attn.o", "mlp.gate", "mlp.down")), slot_of("nonlinear", SMALL))
WATCHED = ("attn", "mlp.in", "mlp", "block")

static = ("model", "sites")
exact, first = fast_jit(shift, static_argnames=static), fast_jit(first_order, static_argnames=static)
expand = fast_jit(higher_order, static_argnames=(*static, "order"))
measure = fast_jit(remainders, static_argnames="model")


def in_doubles(tree):
    return jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), tree)


def noise(tree, seed, scale):
    draw = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: (scale * draw.standard_normal(leaf.shape)).astype(leaf.dtype), tree)


@pytest.fixture(scope="module")
def base():
    base = jax.tree.map(
        lambda leaf: np.asarray(leaf) * 2, fast_jit(init_base, static_argnums=0)(SMALL, jax.random.key(0))
    )
    return base | {"embed": {"embedding": base["embed"]["embedding"] * 25}}  # next to a small one all would bend early


@pytest.fixture(scope="module")
def at(base):
    return Params(base, random_steering(PLAN, SMALL, scale=0.3))


@pytest.fixture(scope="module")
def batch():
    return supervised_batch(13, 2, 6, 2)


@pytest.fixture(scope="module")
def expanded(at, batch):
    """In fp64: where, an update of everything (embedding, norms, projections, LoRA, steering), and its three terms."""
    with jax.enable_x64(True):
        at = in_doubles(at)
        update = noise(at, 1, 0.05)
        return at, update, expand(Model(SMALL, PLAN), at, update, batch, SITES, order=3)


def test_first_order_is_the_finite_difference_at_every_site(expanded, batch):
    at, update, (got, *_) = expanded
    assert {tap.dtype for tap in got.values()} == {jnp.dtype("float64")}
    with jax.enable_x64(True):
        ahead, behind = (exact(Model(SMALL, PLAN), at, update, batch, SITES, s) for s in (1e-6, -1e-6))
        for site in SITES:
            want = (np.asarray(ahead[site]) - np.asarray(behind[site])) / 2e-6
            np.testing.assert_allclose(got[site], want, 1e-6, 1e-6 * np.abs(want).max(), err_msg=site)


WINDOWS = {1: (-12, -6), 2: (-11, -7), 3: (-8, -6.5)}
"""For each order the scales, powers of 2, over which the slope is taken: below, rounding shows; above, later terms."""


def test_remainders_shrink_at_the_power_of_order_plus_one(expanded, batch):
    """Slopes 2, 3 and 4 within 0.1, at every site and layer."""
    at, update, terms = expanded
    powers = np.arange(-12, -6, 0.5)
    with jax.enable_x64(True):
        found = measure(Model(SMALL, PLAN), at, update, batch, terms, 2**powers)
        for order, (first, last) in WINDOWS.items():
            here = (powers >= first) & (powers <= last)
            for site in SITES:
                slopes = log_slope(2 ** powers[here], np.sqrt(found.remainder[site])[order - 1, here])
                np.testing.assert_allclose(slopes, order + 1, atol=0.1, err_msg=f"{site}, order {order}")
        # The same by hand, at one scale.
        by = 2.0**-6.5
        rest = jax.tree.map(np.asarray, exact(Model(SMALL, PLAN), at, update, batch, SITES, by))
        np.testing.assert_allclose(found.shift["mlp"][-1], np.sum(rest["mlp"] ** 2, axis=(1, 2, 3)), 1e-9)
        rest = rest["mlp"] - by * np.asarray(terms[0]["mlp"]) - by**2 * np.asarray(terms[1]["mlp"])
        left = np.sum(rest**2, axis=(1, 2, 3))
        np.testing.assert_allclose(found.remainder["mlp"][1, -1], left, 1e-6)
        np.testing.assert_allclose(explained(found, 2)["mlp"][-1], 1 - left / found.shift["mlp"][-1], 1e-9)


def test_a_low_rank_update_is_that_of_the_merged_weights(base, batch):
    """Exactly for the finite update; to first order in the limit of a small one, where LoRA moves from B = 0."""
    plan, block = PLAN[:1], ("block",)
    plain, steered = Model(SMALL), Model(SMALL, plan)
    with jax.enable_x64(True):
        base, lora = in_doubles((base, random_steering(plan, SMALL, scale=0.3)))
        fresh = {"lora": {site: p | {"B": 0 * p["B"]} for site, p in lora["lora"].items()}}
        weights = fast_jit(merged, static_argnums=0)(plan, base, lora)
        assert len(jax.tree.leaves(weights)) == 4  # the kernels of the plan and nothing else
        at, update = Params(base, fresh), difference(Params(base, lora), Params(base, fresh))
        whole = exact(plain, Params(base, {}), weights, batch, block, 1.0)
        close(exact(steered, at, update, batch, block, 1.0), whole, 1e-10)
        by_merging = first(plain, Params(base, {}), weights, batch, block)
        close(first(steered, at, update, batch, block), by_merging, 1e-10)
        limit = np.asarray(exact(plain, Params(base, {}), weights, batch, block, 1e-7)["block"]) / 1e-7
        close(limit, by_merging["block"], 1e-4)
        assert np.abs(np.asarray(whole["block"]) - limit).max() > 0.1  # which the finite one is not


def test_a_fixed_vector_is_exactly_linear_at_its_own_site(base, batch):
    """Bit for bit the vector at layer 0; behind it the model bends it."""
    plan = (slot_of("fixed", SMALL, layers=(0,), sites=("block",)),)
    model, block = Model(SMALL, plan), ("block",)
    with jax.enable_x64(True):
        at = in_doubles(Params(base, jax.tree.map(jnp.zeros_like, random_steering(plan, SMALL))))
        update = Params(None, in_doubles(random_steering(plan, SMALL, scale=4.0)))
        vector = update.steering["s"]["block"]["v"][0]
        straight = first(model, at, update, batch, block)
        np.testing.assert_array_equal(straight["block"][0], np.broadcast_to(vector, (2, 6, 8)))
        found = measure(model, at, update, batch, (straight,), np.array([0.5, 1.0, 2.0]))
        assert np.all(np.asarray(found.remainder["block"])[0, :, 0] < 1e-28)
        assert np.all(np.asarray(found.remainder["block"])[0, :, 1] > 1e-4)


@pytest.mark.slow
def test_composes_with_grad_and_vmap(at, batch):
    """The gradient of a size of the shift in the update is its jvp; shifts of several updates at once."""
    model, block = Model(SMALL, PLAN), ("block",)
    updates = [noise(Params({}, at.steering), seed, 0.02) for seed in (1, 2)]

    def size(update):
        bent = jax.tree.map(
            jnp.subtract, shift(model, at, update, batch, block), first_order(model, at, update, batch, block)
        )
        return energy(bent, batch)["block"].sum()

    @fast_jit
    def both(update, direction):
        grads = jax.grad(size)(update)
        inner = sum(jnp.vdot(a, b) for a, b in zip(*map(jax.tree.leaves, (grads, direction)), strict=True))
        return inner, jax.jvp(size, (update,), (direction,))[1]

    inner, along = both(*updates)
    assert abs(along) > 1e-4
    close(inner, along, 1e-4)
    stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *updates)
    together = fast_jit(jax.vmap(lambda u: first_order(model, at, u, batch, block)))(stacked)
    for i, update in enumerate(updates):
        close(together["block"][i], first(model, at, update, batch, block)["block"], 1e-4)


def test_packed_and_padded_rows_shift_alike(tiny_config, tiny_base):
    model, at, block = Model(tiny_config), Params(tiny_base, {}), ("block",)
    update = Params({"blocks": noise(tiny_base["blocks"], 3, 0.01)}, {})

    @fast_jit
    def both(batch):
        straight = first_order(model, at, update, batch, block)
        return straight["block"], remainders(model, at, update, batch, (straight,), jnp.array([0.5]))

    seen = {}
    for layout, (batch, where) in layouts(tiny_config.vocab_size).items():
        straight, found = both(batch)
        seen[layout] = {i: straight[:, row, part] for i, (row, part) in where.items()}, found.remainder
        by_hand = sum(np.sum(np.square(s), axis=(1, 2)) for s in seen[layout][0].values())
        close(energy({"block": straight}, batch)["block"], by_hand, 1e-4)
    close(seen["left"], seen["right"], 1e-4)
    close(seen["packed"], seen["right"], 1e-4)


def test_reach():
    scales = np.array([0.1, 1.0, 10.0])
    share = np.array([[0.99, 1.0, 0.5], [0.95, 0.99, 0.4], [0.85, 0.95, np.nan]])
    got = fast_jit(reach)(scales, share)
    close(got[0], 10**0.5, 1e-5)
    assert got[1] == np.inf
    assert got[2] == 0
    close(fast_jit(log_slope)(scales, 3 * scales**2.5), 2.5, 1e-5)


def test_bad_input_is_refused(at, batch):
    model, block = Model(SMALL, PLAN), ("block",)
    update = noise(at, 1, 0.1)
    for order in (0, -1):
        with pytest.raises(ValueError, match=f"order {order}.*at least 1"):
            higher_order(model, at, update, batch, block, order=order)
    with pytest.raises(ValueError, match="no terms"):
        remainders(model, at, update, batch, (), np.ones(1))
    with pytest.raises(ValueError, match=r"no site 'mlp.experts'.*mlp.gate"):
        shift(model, at, update, batch, ("mlp.experts",))
    with pytest.raises(ValueError, match="at least one site"):
        shift(model, at, update, batch, ())
    wide = at.base | {"embed": {"embedding": np.zeros((13, 12))}}
    with pytest.raises(ValueError, match=r"embedding.*\(13, 12\).*\(13, 8\)"):
        first_order(model, at, Params(wide, {}), batch, block)
    with pytest.raises(ValueError, match="one architecture"):
        difference(Params(wide, {}), Params(at.base, {}))
    with pytest.raises(ValueError, match=r"lacks.*blocks"):
        difference(Params({"embed": at.base["embed"]}, {}), Params(at.base, {}))
    with pytest.raises(ValueError, match=r"router.*does not have"):
        shift(model, at, Params({"blocks": {"router": np.zeros(3)}}, {}), batch, block)
    with pytest.raises(ValueError, match="changes nothing"):
        shift(model, at, Params(None, {}), batch, block)
    with pytest.raises(ValueError, match=r"\['s'\] cannot be merged"):
        merged(PLAN, at.base, at.steering)
    with pytest.raises(ValueError, match=r"'cudnn'.*forward-mode"):
        shift(Model(SMALL, PLAN, attention="cudnn"), at, update, batch, block)
    one = np.ones(1)
    with pytest.raises(ValueError, match="order 2"):
        explained(Remainders(one, {"block": np.ones((1, 2))}, {"block": np.ones((1, 1, 2))}), 2)
