"""The scan over the layers: against a plain loop, split and rematerialised, and what it captures on the way."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import (
    KINDS,
    TURNS,
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
from jaxsteer.objective import supervised_loss
from jaxsteer.types import SITES, Context

pytestmark = pytest.mark.xdist_group("scan")  # the tests share compiled programs


def one_layer(model, weights, h, batch, steering, layer, steered):
    """A block, with the interventions applied as their contract says; steering holds this layer's slices."""
    config = model.config
    inputs = Inputs(*rotary_angles(config, batch.positions), Span(batch.segments, batch.positions))

    def steer(site, x, y, kernel=None, bias=None):
        for slot in model.plan if steered else ():
            if site in slot.sites:
                out = slot.method.apply(steering[slot.name][site], x, y, Context(layer, kernel, bias))
                mask = select(slot.positions, batch)
                if mask is not None:
                    out = jnp.where(mask.reshape(mask.shape + (1,) * (y.ndim - 2)), out, y)
                y = out
        return y

    return Block(config).apply({"params": weights}, h, inputs, None, steer)[0]


one_layer = fast_jit(one_layer, static_argnames=("model", "steered"))


def unrolled(model, base, steering, batch, layers):
    """The stack as a plain loop over blocks, steered at some layers."""
    h = Embed(model.config).apply({"params": base["embed"]}, batch.tokens)
    for layer in range(model.config.layers):
        index = layers.index(layer) if layer in layers else 0
        own, weights = jax.tree.map(lambda leaf, i=index: leaf[i], steering), jax.tree.map(lambda leaf, i=layer: leaf[i], base["blocks"])
        h = one_layer(model, weights, h, batch, own, jnp.array(layer, jnp.int32), layer in layers)
    return RMSNorm(model.config.norm_eps).apply({"params": base["final_norm"]}, h)


@pytest.mark.parametrize("name", TURNS)
def test_scan_is_the_unrolled_loop(name, tiny_config, tiny_base):
    layers = (1, 3)
    model = Model(tiny_config, all_methods(tiny_config, kinds=KINDS, layers=layers))
    steering = turn(random_steering(model.plan, tiny_config), name)
    batch = supervised_batch(tiny_config.vocab_size)
    want = unrolled(model, tiny_base, steering, batch, layers)
    close(run(model, tiny_base, steering, batch).hidden, want, 1e-5)


@fast_jit
def drawn_loss_and_grads():
    pass


def test_split_and_rematerialised_scans_agree(tiny_config, tiny_base):
    """In training, so with what the methods draw: a block that is computed again draws the same."""
    plan = all_methods(tiny_config, few=True, layers=(2, 3), draws=True)
    steering, batch = random_steering(plan, tiny_config), supervised_batch(tiny_config.vocab_size)

    def loss_and_grads(**settings):
        loss = lambda s, key: supervised_loss(Model(tiny_config, plan, **settings), tiny_base, s, batch, key, train=True)
        return fast_jit(jax.value_and_grad(loss))(steering, jax.random.key(0))

    want = loss_and_grads(remat="none", train_base=True)  # not split
    constants = {"dora", "none"}
    assert all(np.abs(leaf).max() > 1e-5 for leaf in jax.tree.leaves(want[1]))
    for remat in ("selective", "full"):
        close(loss_and_grads(remat=remat), want, 1e-5)
