"""Decoding layer by layer on a CPU: the same numbers as the scan, weights read in place, caches written in place."""

import re

import jax
import numpy as np
import pytest
from tiny import close, fast_jit, random_steering, slot_of, supervised_batch

from jaxsteer import Model, ModelConfig, init_base
from jaxsteer.inference.draws import Drawing
from jaxsteer.inference.rows import Sizes, advance, empty_rows
from jaxsteer.models.by_layer import layers_to_decode
from jaxsteer.models.transformer import Network, forward

CONFIG = ModelConfig(vocab_size=61, width=48, layers=3, heads=4, kv_heads=2, head_dim=16, mlp_width=112, max_length=64)


@pytest.fixture(scope="module")
def base():
    return fast_jit(init_base, static_argnums=0)(CONFIG, jax.random.key(0))


def test_layers_are_views_of_the_stacked_weights(base):
    layers = layers_to_decode(base)
    stack = base["blocks"]["mlp"]["gate"]["kernel"]
    step = stack.nbytes // CONFIG.layers
    at = [layer["mlp"]["gate"]["kernel"].unsafe_buffer_pointer() - stack.unsafe_buffer_pointer() for layer in layers]
    assert at == [i * step for i in range(CONFIG.layers)]


def test_layer_by_layer_is_the_scan(base):
    plan = (slot_of("nonlinear", CONFIG, slot="a"), slot_of("lora", CONFIG, slot="b", layers=(0, 2)))
    model, steering = Model(CONFIG, plan), random_steering(plan, CONFIG)
    batch = supervised_batch(CONFIG.vocab_size)
    see = fast_jit(lambda base: forward(model, base, steering, batch, capture=("block", "attn.heads")))
    split = see({**base, "blocks": layers_to_decode(base)})
    close(split, see(base), 1e-5)


def compiled_step(base, by_layer):
    """The text of the compiled decoding steps of four rows."""
    plan = (slot_of("nonlinear", CONFIG, sites=("block",)),)
    model = Model(CONFIG, plan)
    stepping = {**base, "blocks": layers_to_decode(base)} if by_layer else base
    rows = empty_rows(model, Sizes(4, 16, 23, 2), "float32", by_layer=by_layer)
    network = Network(model, stepping, random_steering(plan, CONFIG))
    args = (network, rows, np.zeros(4, np.int32), np.int32(4))
    return advance.lower(*args, chunk=8, drawing=Drawing(sampling=False, top=False)).compile().as_text()


def test_a_step_copies_neither_weights_nor_caches(base):
    """Slices of stacked weights and of the stacked cache are copies; there are none layer by layer."""
    kernels = {leaf.shape[1:] for leaf in jax.tree.leaves(base["blocks"]) if leaf.ndim == 3}
    K, S, H = CONFIG.kv_heads, 16 + 23, CONFIG.head_dim
    shape = lambda sizes: re.escape(f"f32[{','.join(map(str, sizes))}]")
    kernel = f"(?:{'|'.join(map(shape, kernels))})"
    sliced = lambda text: re.findall(rf"{kernel}\S* (?:copy|dynamic-slice)\(|dynamic-slice\S* = {kernel}", text)
    assert sliced(compiled_step(base, by_layer=False))
    text = compiled_step(base, by_layer=True)
    assert not sliced(text)
    caches = f"(?:{shape((4, K, S, H))}|{shape((4, K, H, S))})"
    assert not re.findall(rf"{caches}\S* copy\(", text.split("ENTRY")[0])
