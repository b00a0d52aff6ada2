"""The attention kernels agree, forward and backward; and which one runs where."""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh
from tiny import fast_jit

from jaxsteer.batches import make_batch
from jaxsteer.models import attention as kernels
from jaxsteer.models.attention import Span, attention, causal_share, choose_attention
from jaxsteer.sharding import AXES


def packed(length, seed=0):
    """q, k, v of two rows with several examples and padding at the end; their span; and a cotangent."""
    draw = np.random.default_rng(seed)
    array = lambda *shape: jnp.asarray(draw.standard_normal(shape, np.float32))
    q, k, v = array(2, length, 4, 16), array(2, length, 2, 16), array(2, length, 2, 16)
    segments = np.zeros((2, length), np.int32)
    segments[0, : length // 3], segments[0, length // 3 : length - 5], segments[1, : length - 9] = 1, 2, 1
    batch = make_batch(jnp.ones((2, length), jnp.int32), segments)
    real = (batch.segments > 0)[..., None, None]
    return (q, k, v), Span(batch.segments, batch.positions), jnp.where(real, array(2, length, 4, 16), 0)


def value_and_gradients(attend, given, span, cotangent):
    """The outputs at real tokens, and the gradients of their product with the cotangent."""
    out, back = jax.vjp(lambda q, k, v: attend(q, k, v, span), *given)
    return jnp.where((span.segments > 0)[..., None, None], out, 0), back(cotangent)


@cache
def dense(length):
    """Outputs and gradients of the dense kernel."""
    return fast_jit(partial(value_and_gradients, partial(attention, kernel="dense")))(*packed(length))


def compare_with_dense(kernel, length):
    got = fast_jit(partial(value_and_gradients, partial(attention, kernel=kernel)))(*packed(length))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, 1e-5, 1e-5), got, dense(length))


@pytest.mark.parametrize("kernel", ["rows", "chunked"])
def test_xla_kernels_agree(kernel, monkeypatch):
    monkeypatch.setattr(kernels, "CHUNK", 48)  # several chunks, the last one padded
    compare_with_dense(kernel, 130)


@pytest.mark.cpu
def test_splash_agrees():
    """The TPU's kernel, interpreted."""
    compare_with_dense("splash", 128)


def test_forward_mode_passes_through_xla_kernels():
    (q, k, v), span, dot = packed(64)
    for kernel in ("rows", "dense", "chunked"):
        attend = lambda q, kernel=kernel: attention(q, k, v, span, kernel=kernel)
        _, tangent = fast_jit(lambda q, dot, attend=attend: jax.jvp(attend, (q,), (dot,)))(q, dot)
        assert np.isfinite(tangent).all()
        assert np.abs(tangent).max() > 0


def test_what_splash_cannot_take():
    (q, k, v), span, _ = packed(64)
    with pytest.raises(ValueError, match="64 tokens are not a multiple of 128"):
        attention(q, k, v, span, kernel="splash")
    with pytest.raises(ValueError, match="unknown attention kernel 'fast'"):
        attention(q, k, v, span, kernel="fast")


LLAMA = {"rows": 64, "length": 2048, "heads": 32, "kv_heads": 8, "head_dim": 128, "dtype": jnp.bfloat16}


@pytest.mark.parametrize(
    ("platform", "changed", "kernel", "reason"),
    [
        ("cpu", {}, "rows", "one CPU"),
        ("cpu", {"mesh": (1, 8, 1)}, "chunked", "on a mesh"),
        ("cpu", {"mesh": (1, 8, 1), "length": 256}, "dense", "on a mesh"),
        ("tpu", {}, "splash", "TPU"),
        ("tpu", {"mesh": (1, 4, 4)}, "splash", "TPU"),
        ("tpu", {"mesh": (1, 1, 16)}, "chunked", "8 key/value heads cannot be split over tensor = 16"),
        ("tpu", {"length": 2000}, "chunked", "2000 tokens are not a multiple of 128"),
        ("gpu", {}, "cudnn", "NVIDIA"),
        ("gpu", {"dtype": jnp.float32}, "chunked", "half precision, not float32"),
        ("gpu", {"head_dim": 256}, "chunked", "got 256"),
        ("metal", {}, "chunked", "no kernel of its own"),
    ],
)
def test_the_choice(platform, changed, kernel, reason):
    mesh = AbstractMesh(changed["mesh"], AXES) if "mesh" in changed else None
    got = choose_attention(platform, **{**LLAMA, **changed, "mesh": mesh})
    assert got[0] == kernel
    assert reason in got[1]


def test_the_share_of_scores_computed():
    assert causal_share(2048, "dense") == 1
    assert causal_share(2048, "splash") == 5 / 8
    assert causal_share(256, "rows") == 5 / 8
