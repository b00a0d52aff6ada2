"""Fits from streamed tokens, against closed forms on all of them at once; and what is kept while they stream."""

import gc

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import close, fast_jit

from jaxsteer.theory import fits

N, IN, OUT = 400, 12, 7
absorb = fast_jit(fits.absorb)


@pytest.fixture(scope="module")
def tokens():
    """Inputs of very different sizes, as in a residual stream, and targets that are not quite linear in them."""
    draw = np.random.default_rng(0)
    x = draw.standard_normal((N, IN)) * np.geomspace(1e3, 1, IN) + 3
    y = x @ draw.standard_normal((IN, OUT)) / np.geomspace(1e3, 1, IN).mean() + 0.3 * np.sin(x[:, :OUT]) + 2
    return x, y


@pytest.fixture(scope="module")
def factor(tokens):
    x, y = (jnp.asarray(t, jnp.float32).reshape(8, -1, t.shape[1]) for t in tokens)
    found = fits.empty(IN, OUT)
    for part in zip(x, y, strict=True):
        found = absorb(found, *part)
    return found


def left(x, y, w, b=0):
    return np.sum((y - x @ w - b) ** 2) / np.sum(y**2)


def test_linear_and_affine_are_least_squares(tokens, factor):
    x, y = tokens
    best = np.linalg.lstsq(x, y, rcond=None)[0]
    found = fits.fit(factor, ridge=0.0)
    close(found.write @ found.read, best.T, 1e-3)
    close(fits.unexplained(factor, found), left(x, y, best), 1e-4)
    centred = np.linalg.lstsq(x - x.mean(0), y - y.mean(0), rcond=None)[0]
    found = fits.fit(factor, "affine", ridge=0.0)
    close(found(jnp.asarray(x[:5], jnp.float32)), (x[:5] - x.mean(0)) @ centred + y.mean(0), 1e-3)
    close(fits.unexplained(factor, found), left(x - x.mean(0), y, centred, y.mean(0)), 1e-4)
    close(fits.unexplained(factor, fits.mean_shift(factor)), left(x, y, np.zeros((IN, OUT)), y.mean(0)), 1e-5)
    close(1 - fits.unexplained(factor, fits.mean_shift(factor)), fits.mean_share(factor), 1e-5)


def test_a_ridge_is_that_of_the_normal_equations(tokens, factor):
    x, y = tokens
    lam = 0.01 * np.sum(x**2) / IN
    best = np.linalg.solve(x.T @ x + lam * np.eye(IN), x.T @ y)
    found = fits.fit(factor, ridge=0.01)
    close(found.write @ found.read, best.T, 1e-4)


@pytest.mark.parametrize("rank", [1, 3])
def test_no_map_of_the_rank_is_better(tokens, factor, rank):
    """Against the truncated singular value decomposition of the fitted values, and alternating least squares."""
    x, y = tokens
    best = np.linalg.lstsq(x, y, rcond=None)[0]
    _, _, vt = np.linalg.svd(x @ best, full_matrices=False)
    found = fits.fit(factor, rank=rank, ridge=0.0)
    assert found.read.shape == (rank, IN)
    ours = float(fits.unexplained(factor, found))
    np.testing.assert_allclose(ours, left(x, y, best @ vt[:rank].T @ vt[:rank]), rtol=1e-3)
    write = np.random.default_rng(1).standard_normal((OUT, rank))
    for _ in range(200):
        read = np.linalg.lstsq(x, y @ np.linalg.pinv(write).T, rcond=None)[0]
        write = np.linalg.lstsq(x @ read, y, rcond=None)[0].T
    np.testing.assert_allclose(ours, left(x, y, read @ write.T), rtol=1e-3)
    np.testing.assert_allclose(1 - ours, np.sum(fits.gains(factor, ridge=0.0)[:rank]), rtol=1e-4)


def test_weights_padding_and_joining(tokens):
    x, y = (jnp.asarray(t, jnp.float32) for t in tokens)
    weights = jnp.asarray(np.random.default_rng(0).integers(0, 3, N), jnp.float32)
    many = absorb(fits.empty(IN, OUT), x.repeat(weights.astype(int), 0), y.repeat(weights.astype(int), 0))
    # What does not count may be anything.
    bad = jnp.where(weights[:, None] > 0, x, jnp.nan)
    one, other = (absorb(fits.empty(IN, OUT), bad[s], y[s], weights[s]) for s in (slice(0, 150), slice(150, N)))
    ours = fits.fit(fits.join(one, other), rank=2)
    close(ours.write @ ours.read, (lambda f: f.write @ f.read)(fits.fit(many, rank=2)), 1e-3)


def test_the_targets_spectrum(tokens, factor):
    _, y = tokens
    close(jnp.linalg.svd(fits.target_factor(factor), compute_uv=False), np.linalg.svd(y, compute_uv=False), 1e-4)
    centred = jnp.linalg.svd(fits.target_factor(factor, centred=True), compute_uv=False)
    close(centred, np.linalg.svd(y - y.mean(0), compute_uv=False), 1e-4)


def test_memory_does_not_grow_with_the_tokens():
    """10 thousand and 100 thousand tokens: the same arrays are alive, of the same sizes."""

    @fast_jit
    def take(factor, sample, number):
        key = jax.random.key(number)
        x = jax.random.normal(key, (1000, 16))
        y = jnp.sin(x[:, :8])
        return fits.absorb(factor, x, y), fits.draw(sample, key, x, y, x[:, 0] > 0)

    def alive(thousands):
        kept = fits.empty(16, 8), fits.empty_sample(64, 16, 8)
        most = 0
        for number in range(thousands):
            kept = jax.block_until_ready(take(*kept, number))
            most = max(most, sum(array.nbytes for array in jax.live_arrays()) - before)
        assert float(kept[0].triangle[0, 0] ** 2) == pytest.approx(1e3 * thousands, rel=1e-3)
        assert float(jnp.min(kept[1].x[:, 0])) > 0  # only where the mask held
        return most

    gc.collect()
    before = sum(array.nbytes for array in jax.live_arrays())

    alive(1)
    few, many = alive(10), alive(100)
    assert many == few > 0


def test_a_sample_is_uniform():
    x = jnp.arange(1000.0)[:, None]
    counts = np.zeros(10)
    pick = fast_jit(lambda s, key, part: fits.draw(s, key, part, part, part[:, 0] >= 0))
    for seed in range(40):
        sample = fits.empty_sample(50, 1, 1)
        for i in range(10):
            sample = pick(sample, jax.random.key(100 * seed + i), x[i * 100 : i * 100 + 100])
        counts += np.histogram(np.asarray(sample.x), 10, (0, 1000))[0]
        assert len(set(np.asarray(sample.x[:, 0]))) == 50
    assert np.all(np.abs(counts - 200) < 5 * np.sqrt(200))


@pytest.mark.parametrize("activation", ["silu", pytest.param("tanh", marks=pytest.mark.slow)])
def test_a_planted_nonlinear_map_is_found(activation):
    draw = np.random.default_rng(0)
    x = jnp.asarray(draw.standard_normal((2000, IN)) * np.geomspace(30, 1, IN), jnp.float32)
    down = jnp.asarray(draw.standard_normal((2, IN)) / np.geomspace(30, 1, IN), jnp.float32)
    up = jnp.asarray(draw.standard_normal((OUT, 2)), jnp.float32)
    act = {"silu": jax.nn.silu, "tanh": jnp.tanh}[activation]
    y = act(x @ down.T) @ up.T
    factor = absorb(fits.empty(IN, OUT), x, y)
    sample = fits.draw(fits.empty_sample(500, IN, OUT), jax.random.key(0), x, y, jnp.ones(2000, bool))
    found = fits.fit_nonlinear(factor, sample, 2, activation)
    error = jnp.sum((y - act(x @ found.read.T) @ found.write.T) ** 2) / jnp.sum(y**2)
    linear = fits.unexplained(factor, fits.fit(factor, rank=2))
    assert linear > 0.05
    assert error < 1e-4


def test_what_does_not_fit_is_refused(factor):
    with pytest.raises(ValueError, match=r"rank 8 .* between 1 and 7"):
        fits.fit(factor, rank=8)
    with pytest.raises(ValueError, match="form 'quadratic'"):
        fits.fit(factor, "quadratic")
    with pytest.raises(ValueError, match=r"from 12 to 7 .* \(3, 7\)"):
        fits.absorb(factor, jnp.zeros((3, 7)), jnp.zeros((3, 7)))
    with pytest.raises(ValueError, match="unknown activation"):
        fits.fit_nonlinear(factor, fits.empty_sample(4, IN, OUT), 2, "cube")
