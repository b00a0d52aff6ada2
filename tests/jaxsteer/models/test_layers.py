"""The parts of a block by themselves, against plain numpy."""

from functools import partial
from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import Calling, fast_jit

from jaxsteer.models.attention import (
    CachedKeys,
    Span,
    attend_causal_row,
    attend_row,
    attention,
    cached_attention,
    visible,
)
from jaxsteer.models.config import ModelConfig, RopeScaling
from jaxsteer.models.layers import MLP, RMSNorm, rotary_angles, rotary_frequencies, rotate

TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}
SIZES = {"vocab_size": 11, "width": 12, "layers": 2, "heads": 4, "kv_heads": 2, "head_dim": 8, "mlp_width": 20}


def draw(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def test_rms_norm():
    x, scale = draw(0, 2, 3, 12) * 5, draw(1, 12)
    want = x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + 1e-3) * scale
    got = RMSNorm(1e-3).apply({"params": {"scale": jnp.asarray(scale)}}, jnp.asarray(x))
    np.testing.assert_allclose(got, want, **TOLERANCE)


def test_rms_norm_computes_in_fp32():
    x = jnp.asarray(draw(0, 2, 300) * 300, jnp.bfloat16)  # bf16 could not sum the squares exactly enough
    params = {"params": {"scale": jnp.ones(300, jnp.bfloat16)}}
    got = RMSNorm(1e-5).apply(params, x)
    assert got.dtype == jnp.bfloat16
    wide = np.asarray(x, np.float32)
    want = wide / np.sqrt(np.mean(wide**2, axis=-1, keepdims=True) + 1e-5)
    np.testing.assert_array_equal(got, jnp.asarray(want).astype(jnp.bfloat16))


def test_rotary_is_a_rotation_of_pairs():
    config = ModelConfig(**SIZES, rope_theta=100.0)
    positions = np.array([[0, 1, 5], [7, 2, 0]])
    x = draw(0, 2, 3, 4, 8)
    got = rotate(jnp.asarray(x), *rotary_angles(config, jnp.asarray(positions)))
    pairs = x[..., :4] + 1j * x[..., 4:]
    angles = positions[..., None] * 100.0 ** (-np.arange(4) / 4)
    turned = pairs * np.exp(1j * angles)[:, :, None]
    np.testing.assert_allclose(got, np.concatenate([turned.real, turned.imag], -1), **TOLERANCE)
    np.testing.assert_array_equal(got[0, 0], x[0, 0])


@pytest.mark.parametrize("kind", ["linear", "llama3"])
def test_scaled_frequencies(kind):
    scaling = RopeScaling(kind, factor=8.0, low_factor=1.0, high_factor=4.0, original_length=64)
    config = ModelConfig(**(SIZES | {"head_dim": 32}), rope_scaling=scaling)
    met = set()
    for got, i in zip(rotary_frequencies(config), range(16), strict=True):
        plain = 10000.0 ** (-2 * i / 32)
        wavelength = 2 * np.pi / plain
        if kind == "linear":
            want = plain / 8
        elif wavelength > 64 / 1.0:
            met.add("divided")
            want = plain / 8
        elif wavelength < 64 / 4.0:
            met.add("kept")
            want = plain
        else:
            met.add("blended")
            smooth = (64 / wavelength - 1.0) / (4.0 - 1.0)
            want = (1 - smooth) * plain / 8 + smooth * plain
        np.testing.assert_allclose(got, want, rtol=1e-5)
    assert kind == "linear" or met == {"divided", "kept", "blended"}


def naive_attention(q, k, v, query, key):
    """Loops over rows, heads and queries."""
    B, T, N, H = q.shape
    out = np.zeros_like(q)
    for b in range(B):
        for n in range(N):
            head = n // (N // k.shape[2])
            for t in range(T):
                seen = (
                    (key.segments[b] == query.segments[b, t])
                    & (key.positions[b] <= query.positions[b, t])
                    & (key.segments[b] > 0)
                )
                if not seen.any():
                    continue
                scores = k[b, seen, head] @ q[b, t, n] / np.sqrt(H)
                weights = np.exp(scores - scores.max())
                out[b, t, n] = weights / weights.sum() @ v[b, seen, head]
    return out


def packed_span(B, T, seed=0):
    """Rows of several segments, with padding before and after."""
    segments, positions = np.zeros((2, B, T), np.int32)
    for b in range(B):
        cuts = [b, T // 3, T // 2 + b, T - 2 * b]
        for number, (start, stop) in enumerate(pairwise(cuts), 1):
            segments[b, start:stop] = number
            positions[b, start:stop] = np.arange(stop - start)
    return Span(segments, positions)


# 131 is cut into two blocks of unequal length; 13 is one block.
@pytest.mark.parametrize("length", [13, 131])
def test_attention_against_loops(length):
    q, k, v = (draw(i, 2, length, heads, 8) for i, heads in enumerate((4, 2, 2)))
    span = packed_span(2, length)
    got = np.asarray(fast_jit(attention)(q, k, v, span))
    assert np.all(np.isfinite(got))
    real = span.segments > 0
    np.testing.assert_allclose(got[real], naive_attention(q, k, v, span, span)[real], **TOLERANCE)


def test_attention_to_cached_keys_against_loops():
    query = Span(np.array([[2, 2], [1, 1]]), np.array([[3, 4], [0, 1]]))
    key = Span(np.array([[1, 2, 2, 2, 2, 2], [0, 1, 1, 1, 0, 0]]), np.array([[0, 0, 1, 2, 3, 4], [0, 0, 1, 2, 0, 0]]))
    q, k, v = draw(0, 2, 2, 4, 8), draw(1, 2, 6, 2, 8), draw(2, 2, 6, 2, 8)
    held = lambda s: CachedKeys(*(x[:, s].swapaxes(1, 2) for x in (k, v)), jax.tree.map(lambda f: f[:, s], key))
    for split in (0, 2, 6):  # some in the cache, the others new
        got = fast_jit(cached_attention)(q, query, held(slice(split)), held(slice(split, None)))
        np.testing.assert_allclose(got, naive_attention(q, k, v, query, key), **TOLERANCE)


@pytest.mark.parametrize("length", [64, 130, 515])
def test_blocks_of_queries_are_the_whole_row(length):
    qkv = [jnp.asarray(draw(i, length, heads, 8)) for i, heads in enumerate((4, 2, 2))]
    span = jax.tree.map(lambda x: jnp.asarray(x[0]), packed_span(1, length))
    real = np.asarray(span.segments) > 0
    cotangent = jnp.asarray(draw(9, length, 4, 8) * real[:, None, None])

    @partial(fast_jit, static_argnums=0)
    def value_and_pullback(f, qkv):
        out, pull = jax.vjp(f, *qkv)
        return out, pull(cotangent)

    out, grads = value_and_pullback(lambda q, k, v: attend_causal_row(q, k, v, span), qkv)
    want, want_grads = value_and_pullback(lambda q, k, v: attend_row(q, k, v, span, span), qkv)
    np.testing.assert_allclose(np.asarray(out)[real], np.asarray(want)[real], **TOLERANCE)
    for got, wanted in zip(grads, want_grads, strict=True):
        np.testing.assert_allclose(got, wanted, **TOLERANCE)


def test_visible():
    span = Span(jnp.array([1, 1, 2, 0]), jnp.array([0, 1, 0, 0]))
    want = [[1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 0]]
    np.testing.assert_array_equal(visible(span, span), np.array(want, bool))


@pytest.mark.parametrize("bias", [False, True])
def test_mlp(bias):
    config = ModelConfig(**SIZES, mlp_bias=bias)
    x = draw(0, 2, 3, 12)
    shapes = {"gate": (12, 20), "up": (12, 20), "down": (20, 12)}
    params = {name: {"kernel": draw(i, *shape)} for i, (name, shape) in enumerate(shapes.items())}
    if bias:
        params = {n: p | {"bias": draw(5 + i, shapes[n][1])} for i, (n, p) in enumerate(params.items())}
    project = lambda name, x: x @ params[name]["kernel"] + params[name].get("bias", np.float32(0))
    gate = project("gate", x)
    want = project("down", gate / (1 + np.exp(-gate)) * project("up", x))
    calls = []

    def steer(site, x, y, kernel, bias):
        calls.append((site, x.shape, y.shape, None if kernel is None else kernel.shape))
        return y

    got = MLP(config).apply({"params": jax.tree.map(jnp.asarray, params)}, jnp.asarray(x), Calling(steer))
    np.testing.assert_allclose(got, want, **TOLERANCE)
    assert calls == [
        ("mlp.gate", (2, 3, 12), (2, 3, 20), (12, 20)),
        ("mlp.up", (2, 3, 12), (2, 3, 20), (12, 20)),
        ("mlp.down", (2, 3, 20), (2, 3, 12), (20, 12)),
        ("mlp", (2, 3, 12), (2, 3, 12), None),
    ]


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [("kv_heads", 3, "kv_heads"), ("head_dim", 7, "head_dim"), ("layers", 0, "layers"), ("width", 0, "width")],
)
def test_impossible_shapes_raise(field, value, message):
    with pytest.raises(ValueError, match=message):
        ModelConfig(**(SIZES | {field: value}))
