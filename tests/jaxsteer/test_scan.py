"""The scan over layers: against a plain loop, split and rematerialised, and the taps that it captures."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import (
    KINDS,
    TURNS,
    Calling,
    all_methods,
    close,
    fast_jit,
    loss_and_grads,
    random_steering,
    run,
    slot_of,
    supervised_batch,
    turn,
)

from jaxsteer import Model
from jaxsteer.batches import select
from jaxsteer.models.attention import Span
from jaxsteer.models.config import site_dims
from jaxsteer.models.layers import Block, Embed, Inputs, RMSNorm, rotary_angles
from jaxsteer.objectives.supervised import supervised_loss
from jaxsteer.types import SITES, Context

pytestmark = pytest.mark.xdist_group("scan")  # the tests share compiled programs


def one_layer(model, weights, h, batch, steering, layer, steered):
    """One block with the interventions applied as their protocol says; `steering` holds this layer's slices."""
    config = model.config
    inputs = Inputs(*rotary_angles(config, batch.positions), Span(batch.segments, batch.positions))

    def steer(site, x, y, kernel, bias):
        for slot in model.plan if steered else ():
            if site in slot.sites:
                out = slot.method.apply(steering[slot.name][site], x, y, Context(layer, kernel, bias))
                mask = select(slot.positions, batch)
                if mask is not None:
                    out = jnp.where(mask.reshape(mask.shape + (1,) * (y.ndim - 2)), out, y)
                y = out
        return y

    return Block(config).apply({"params": weights}, h, inputs, None, Calling(steer))[0]


one_layer = fast_jit(one_layer, static_argnames=("model", "steered"))


def unrolled(model, base, steering, batch, layers):
    """The stack as a plain loop over blocks, steered at some layers."""
    h = Embed(model.config).apply({"params": base["embed"]}, batch.tokens, batch.positions)
    for layer in range(model.config.layers):
        index = layers.index(layer) if layer in layers else 0
        own = jax.tree.map(lambda leaf, i=index: np.asarray(leaf)[i], steering)
        weights = jax.tree.map(lambda leaf, i=layer: np.asarray(leaf)[i], base["blocks"])
        h = one_layer(model, weights, h, batch, own, np.int32(layer), layer in layers)
    return RMSNorm(model.config.norm_eps).apply({"params": base["final_norm"]}, h)


@pytest.mark.parametrize("name", TURNS)
def test_scan_is_the_unrolled_loop(name, tiny_config, tiny_base):
    layers = (1, 3)
    model = Model(tiny_config, all_methods(tiny_config, few=True, kinds=KINDS, layers=layers))
    steering = turn(random_steering(model.plan, tiny_config), name)
    batch = supervised_batch(tiny_config.vocab_size)
    want = unrolled(model, tiny_base, steering, batch, layers)
    close(run(model, tiny_base, steering, batch).hidden, want, 1e-5)


def test_split_and_rematerialised_scans_agree(tiny_config, tiny_base):
    """In training mode, with random numbers: a recomputed block must draw the same ones."""
    names = ("nonlinear", "loreft", "jola", "dora", "pissa")  # nothing drawn; dropout on Δ; gates; dropout on x
    plan = all_methods(tiny_config, names, few=True, layers=(2, 3), draws=True)
    steering, batch = random_steering(plan, tiny_config), supervised_batch(tiny_config.vocab_size)

    def loss_and_grads(**settings):
        model = Model(tiny_config, plan, **settings)
        loss = lambda s, key: supervised_loss(model, tiny_base, s, batch, key, train=True)
        return fast_jit(jax.value_and_grad(loss))(steering, jax.random.key(0))

    want = loss_and_grads(remat="none", train_base=True)  # not split
    assert all(np.abs(leaf).max() > 1e-5 for leaf in jax.tree.leaves(want[1]))
    for remat in ("selective", "full"):
        close(loss_and_grads(remat=remat), want, 1e-5)


@pytest.mark.parametrize(("layers", "remat"), [(None, "full"), ((2, 3), "none")])
def test_other_pairs_of_split_and_rematerialisation(layers, remat, tiny_config, tiny_base):
    """Not split and selective is the default, whose gradients test_golden.py compares with the references'."""
    plan = (slot_of("nonlinear", tiny_config, layers=layers, sites=("block",)),)
    steering = random_steering(plan, tiny_config)
    batch = supervised_batch(tiny_config.vocab_size)
    model = Model(tiny_config, plan, remat="none", train_base=True)
    want = loss_and_grads(model, tiny_base, steering, batch)
    close(loss_and_grads(Model(tiny_config, plan, remat=remat), tiny_base, steering, batch), want, 1e-5)


# ---- taps


def test_every_site_is_captured_once_per_layer(tiny_config, tiny_base):
    batch = supervised_batch(tiny_config.vocab_size, B=2, T=5)
    out = run(Model(tiny_config), tiny_base, {}, batch, capture=SITES)
    chex.assert_shape(out.hidden, (2, 5, 32))
    assert set(out.taps) == set(SITES)
    for site in SITES:
        chex.assert_shape(out.taps[site], (4, 2, 5, *site_dims(tiny_config, site).y))
    # Each tap belongs to its layer and site: recompute every layer from the one before.
    taps, base = jax.tree.map(np.asarray, (out.taps, tiny_base))
    embedded = base["embed"]["embedding"][np.asarray(batch.tokens)]
    before = np.concatenate([embedded[None], taps["block"][:-1]])
    close(taps["block"], before + taps["attn"] + taps["mlp"], 1e-5)
    for site, source in (("gate", taps["mlp.in"]), ("up", taps["mlp.in"])):
        kernel = base["blocks"]["mlp"][site]["kernel"]
        close(taps[f"mlp.{site}"], np.einsum("lbtd,ldf->lbtf", source, kernel), 1e-5)
    close(taps["mlp"], taps["mlp.down"], 0)
    heads = taps["attn.heads"].reshape(4, 2, 5, -1)
    close(taps["attn"], np.einsum("lbtd,ldf->lbtf", heads, base["blocks"]["attn"]["o"]["kernel"]), 1e-5)


def test_taps_of_a_split_scan_and_after_the_intervention(tiny_config, tiny_base):
    plan = (slot_of("fixed", tiny_config, sites=("mlp",), layers=(3,)),)
    steering = random_steering(plan, tiny_config)
    batch = supervised_batch(tiny_config.vocab_size, B=2, T=5)
    plain = jax.tree.map(np.asarray, run(Model(tiny_config), tiny_base, {}, batch, capture=SITES).taps)
    steered = run(Model(tiny_config, plan), tiny_base, steering, batch, capture=("mlp", "block")).taps
    assert sorted(steered) == ["block", "mlp"]
    steered = jax.tree.map(np.asarray, steered)
    close(steered["mlp"][:3], plain["mlp"][:3], 1e-5)
    shift = np.asarray(steering["s"]["mlp"]["v"])
    close(steered["mlp"][3] - plain["mlp"][3], np.broadcast_to(shift[:, None], (2, 5, 32)), 1e-5)


def test_unknown_site_and_wrong_steering_raise(tiny_config, tiny_base):
    batch = supervised_batch(tiny_config.vocab_size)
    with pytest.raises(ValueError, match=r"mlp\.out"):
        run(Model(tiny_config), tiny_base, {}, batch, capture=("mlp.out",))
    plan = (slot_of("fixed", tiny_config, slot="mine"),)
    with pytest.raises(ValueError, match="mine"):
        run(Model(tiny_config, plan), tiny_base, {}, batch)
    with pytest.raises(ValueError, match="mine"):
        run(Model(tiny_config), tiny_base, random_steering(plan, tiny_config), batch)
