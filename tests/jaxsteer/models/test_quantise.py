"""An int8 base: its error, its size, and that everything on top works as on a float base."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import close, fast_jit, loss_and_grads, run, supervised_batch

from jaxsteer import LoRA, Model, NonlinearSteering, PiSSA, Slot, init_steering, make_batch
from jaxsteer.folding import fold_weights
from jaxsteer.interventions import DoRA
from jaxsteer.io import load_model, save_hf
from jaxsteer.models.quantise import dequantised, is_quantised, quantise, quantise_kernel
from jaxsteer.models.transformer import forward, init_cache
from jaxsteer.types import PROJECTIONS


@fast_jit
def float_base(base):
    """The float base that an int8 one represents."""
    blocks = {
        part: {name: dequantised(leaf) if isinstance(leaf, dict) else leaf for name, leaf in tree.items()}
        if part in ("attn", "mlp")
        else tree
        for part, tree in base["blocks"].items()
    }
    return base | {"blocks": blocks}


@pytest.fixture(scope="module")
def small(tiny_base):
    return fast_jit(quantise)(tiny_base)


def test_each_output_has_its_scale():
    draw = np.random.default_rng(0)
    kernel = jnp.asarray(draw.standard_normal((2, 5, 3)) * [[[1.0, 100.0, 0.0]]], jnp.float32)
    quantised, scale = quantise_kernel(kernel)
    assert quantised.dtype == jnp.int8
    assert scale.shape == (2, 3)
    assert int(jnp.abs(quantised[..., :2]).max(axis=1).min()) == 127
    assert not quantised[..., 2].any()
    back = quantised.astype(jnp.float32) * scale[:, None]
    assert float(jnp.abs(back - kernel).max()) <= float(scale.max()) / 2 * (1 + 1e-6)


def test_products_are_those_of_the_rounded_weights(small, tiny_base, tiny_config):
    """The scale after the product is the scale before it; biases, norms and the embedding are untouched."""
    batch = supervised_batch(tiny_config.vocab_size)
    plan = (
        Slot("s", NonlinearSteering(rank=2), ("block",)),
        Slot("l", LoRA(rank=2), PROJECTIONS),
        Slot("d", DoRA(rank=2), ("mlp.down", "attn.q")),
    )
    init = fast_jit(lambda base: init_steering(plan, tiny_config, jax.random.key(0), base=base))
    steering = jax.tree.map(lambda leaf: np.asarray(leaf) + np.float32(0.02), init(small))
    model, rounded = Model(tiny_config, plan), float_base(small)
    (loss, grads), (want, wanted) = (loss_and_grads(model, base, steering, batch) for base in (small, rounded))
    close(loss, want, 1e-5)
    jax.tree.map(lambda a, b: close(a, b, 1e-5), grads, wanted)
    untouched = run(Model(tiny_config), tiny_base, {}, batch).hidden
    off = run(Model(tiny_config), small, {}, batch).hidden - untouched
    assert 1e-4 < float(jnp.std(off) / jnp.std(untouched)) < 0.02


def test_weights_are_a_quarter(small, tiny_base):
    size = lambda base: sum(leaf.nbytes for leaf in jax.tree.leaves(base["blocks"]["mlp"]))
    assert size(small) < 0.3 * size(tiny_base)
    assert is_quantised(small)
    assert not is_quantised(tiny_base)


def test_decoding(small, tiny_config):
    like = supervised_batch(tiny_config.vocab_size).tokens  # of this shape, so that the full forward is compiled once
    tokens = np.arange(like.size, dtype=np.int32).reshape(like.shape) % tiny_config.vocab_size
    model = Model(tiny_config)
    full = run(model, small, {}, make_batch(tokens)).hidden
    step = fast_jit(lambda base, batch, cache: forward(model, base, {}, batch, cache=cache))
    out = step(small, make_batch(tokens), init_cache(tiny_config, *like.shape))
    close(out.hidden, full, 1e-5)


def test_pissa_and_merging_start_from_the_rounded_weights(small, tiny_config):
    plan = (Slot("p", PiSSA(rank=2), ("attn.q",)),)
    one, other = (init_steering(plan, tiny_config, jax.random.key(0), base=b) for b in (small, float_base(small)))
    jax.tree.map(lambda a, b: close(a, b, 1e-6), one, other)
    plan = (Slot("l", LoRA(rank=2), ("attn.q",)),)
    steering = jax.tree.map(lambda x: x + 0.1, init_steering(plan, tiny_config, jax.random.key(0)))
    merged, rest, _ = fold_weights(plan, small, steering)
    assert rest == ()
    batch = supervised_batch(tiny_config.vocab_size)
    close(
        run(Model(tiny_config), merged, {}, batch).hidden,
        run(Model(tiny_config, plan), small, steering, batch).hidden,
        1e-5,
    )


def test_loaded_as_made(golden, tmp_path):
    """Loading quantises each projection by itself, fused ones too."""
    for name in ("phi3", "gpt2"):
        folder = golden / "families" / name
        whole, small = load_model(folder), load_model(folder, quantised=True)
        jax.tree.map(np.testing.assert_array_equal, small.base, quantise(whole.base))
    with pytest.raises(ValueError, match="the base is in int8, which this format does not have"):
        save_hf(tmp_path / "out", small.config, small.base, small.family)
