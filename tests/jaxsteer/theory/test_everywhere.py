"""What must hold in every family, and on a mesh of eight devices."""

import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import fast_jit, layouts, slot_of

from jaxsteer import Model, Params
from jaxsteer.io import load_model
from jaxsteer.models.config import projections_of
from jaxsteer.models.families import FAMILIES
from jaxsteer.models.transformer import forward, logits_of, output_embedding
from jaxsteer.objectives.supervised import supervised_loss
from jaxsteer.objectives.tokens import next_tokens
from jaxsteer.steering import steering_shapes
from jaxsteer.theory import first_order, gauss_newton_product, mlp_shift, only_layer, shift, tangent_loss
from jaxsteer.theory.mlp import layer_mlp
from jaxsteer.types import ACTIVATIONS

ROOT = Path(__file__).resolve().parents[3]
FAST = "gemma2"  # soft-caps, a window in half of the layers, norms behind the sublayers, 1 + scale
slow = [pytest.param(name, marks=pytest.mark.slow) for name in FAMILIES if name != FAST]


def noise(tree, seed, scale):
    draw = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: scale * draw.standard_normal(leaf.shape), tree)


@pytest.mark.parametrize("name", [FAST, *slow])
def test_every_family(name, golden):
    """In fp64 on packed rows: first order at every site, the closed form, Gauss–Newton, and the tangent model."""
    loaded = load_model(golden / ("tiny_llama" if name == "llama" else f"families/{name}"))
    config, batch = loaded.config, layouts(loaded.config.vocab_size)["packed"][0]
    plan = (slot_of("nonlinear", config, sites=("mlp", "block")),)
    model, layer = Model(config, plan), config.layers - 1
    real = np.asarray(batch.segments) > 0
    sites = (*ACTIVATIONS, *projections_of(config))
    with jax.enable_x64(True):
        base = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), loaded.base)
        at = Params(base, noise(steering_shapes(plan, config), 1, 0.1))
        update = Params(*noise(at, 2, 0.01))

        @fast_jit
        def measure(at, update):
            found = first_order(model, at, update, batch, sites)
            ahead, behind = (shift(model, at, update, batch, sites, scale) for scale in (1e-5, -1e-5))
            difference = jax.tree.map(lambda a, b: (a - b) / 2e-5, ahead, behind)

            own = only_layer(update, layer)
            taps = forward(model, *at, batch, capture=("mlp.in",)).taps
            both = None
            if config.gated:
                of_mlp = {part: own.base["blocks"]["mlp"][part] for part in ("gate", "up", "down")}
                own = Params({"blocks": {"mlp": of_mlp}}, {})
                by_jvp = first_order(model, at, own, batch, ("mlp.down",))["mlp.down"][layer]
                weights, change = layer_mlp(at.base, layer), jax.tree.map(lambda leaf: leaf[layer], of_mlp)
                both = by_jvp, mlp_shift(weights, change, taps["mlp.in"][layer], config.activation)

            logits = lambda s: logits_of(
                forward(model, at.base, s, batch).hidden, output_embedding(at.base), config.final_softcap
            )
            z, dot = jax.jvp(logits, (at.steering,), (update.steering,))
            p, weight = jax.nn.softmax(z), next_tokens(batch).weights.astype(z.dtype)
            spread = jnp.sum(p * dot**2, axis=-1) - jnp.sum(p * dot, axis=-1) ** 2
            bent = gauss_newton_product(model, *at, batch, update.steering)
            pairs = zip(jax.tree.leaves(update.steering), jax.tree.leaves(bent), strict=True)
            curvature = sum(jnp.vdot(a, b) for a, b in pairs), jnp.sum(weight * spread) / jnp.sum(weight)
            losses = tangent_loss(model, *at, batch, at=at), supervised_loss(model, *at, batch)
            return found, difference, both, curvature, losses

        found, difference, both, curvature, losses = jax.device_get(measure(at, update))
    for site in sites:
        got, want = found[site][:, real], difference[site][:, real]
        assert np.abs(want).max() > 1e-6
        np.testing.assert_allclose(got, want, 1e-5, 1e-5 * np.abs(want).max(), err_msg=site)
    assert (both is not None) == config.gated
    if both is not None:
        by_jvp, closed = both
        np.testing.assert_allclose(by_jvp[real], closed[real], 1e-9, 1e-9 * np.abs(closed).max())
    np.testing.assert_allclose(*curvature, rtol=1e-6)
    np.testing.assert_allclose(*losses, rtol=1e-6)


ON_A_MESH = """
import jax
jax.config.update("jax_num_cpu_devices", 8)
import numpy as np
from functools import partial
from jaxsteer import Model, ModelConfig, Params, Slot, NonlinearSteering, init_base, make_batch
from jaxsteer.sharding import MeshShape, base_shardings, batch_shardings, make_mesh
from jaxsteer.steering import steering_shapes
from jaxsteer.theory import FitSettings, Network, gauss_newton_product, higher_order, measure, means, remainders
from jaxsteer.theory import tangent_loss, to_lora, to_steering

config = ModelConfig(vocab_size=64, width=32, layers=2, heads=4, kv_heads=4, head_dim=8, mlp_width=48)
plan = (Slot("s", NonlinearSteering(rank=4), ("block",)),)
draw = np.random.default_rng(0)
noise = lambda tree, scale: jax.tree.map(lambda x: (scale * draw.standard_normal(x.shape)).astype(np.float32), tree)
base = noise(jax.eval_shape(partial(init_base, config), jax.random.key(0)), 0.3)
at = Params(base, noise(steering_shapes(plan, config), 0.3))
update = Params(*noise(at, 0.01))
segments = np.repeat([[1, 2]], 8, axis=0).repeat(8, axis=1)
weights = (np.arange(16) % 8 > 3) * np.ones((8, 1), np.float32)
batch = make_batch(draw.integers(3, 64, (8, 16)), segments, weights)

def observe(at, update, batch):
    model = Model(config, plan)
    terms = higher_order(model, at, update, batch, ("mlp", "block"), order=2)
    found = remainders(model, at, update, batch, terms, np.array([0.5, 1.0], np.float32))
    moved = jax.tree.map(lambda a, u: a + u, at, update)
    bent = gauss_newton_product(model, *at, batch, update.steering)
    return terms, found, bent, tangent_loss(model, *moved, batch, at=at)

def converted(at, batch):
    tuned, plain = Network(Model(config, plan), *at), Network(Model(config), at.base, {})
    fitted = to_steering(tuned, plain, [batch], FitSettings("affine", rank=4))
    lora = to_lora(fitted.network, plain, [batch], rank=4)
    kl = lambda network: means(measure(tuned, network, [batch], "all")).kl
    return np.array([kl(plain), kl(fitted.network), kl(lora.network)]), fitted.unexplained, lora.unexplained

want = jax.device_get(jax.jit(observe)(at, update, batch))
fitted = converted(at, batch)
assert fitted[0][1] < fitted[0][0] / 2, fitted
for shape in (MeshShape(data=8), MeshShape(fsdp=8), MeshShape(fsdp=2, tensor=4)):
    mesh = make_mesh(shape)
    with jax.set_mesh(mesh):
        put = lambda tree: Params(jax.device_put(tree.base, base_shardings(tree.base, mesh)), tree.steering)
        spread, rows = put(at), jax.device_put(batch, batch_shardings(batch, mesh))
        got = jax.jit(observe)(spread, put(update), rows)
        same = converted(spread, rows)
    assert len(got[0][0]["block"].sharding.device_set) == 8
    for a, b in zip(jax.tree.leaves(jax.device_get(got)), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, 1e-3, 1e-4 * np.abs(b).max())
    for a, b in zip(same, fitted, strict=True):
        np.testing.assert_allclose(a, b, 1e-3, 1e-5)
    print("equal", shape)
"""


@pytest.mark.slow
def test_on_a_mesh_as_on_one_device():
    done = subprocess.run([sys.executable, "-c", ON_A_MESH], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.count("equal") == 3, done.stderr[-3000:]
