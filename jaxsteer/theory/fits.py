"""Best maps h → Δh, from tokens that stream by: what is kept does not grow with their number.

All that least squares needs of tokens X [n, in] and targets Y [n, out] is the triangular factor of their QR
decomposition, R = qr([1 X Y]); that of more tokens is qr([R; 1 X Y]). It is the root of the normal equations
(RᵀR = [1 X Y]ᵀ[1 X Y]), but never forms them: where a few directions of a residual stream are a thousand times as
large as the others, squares would lose the small ones in fp32.

With λ = ridge · tr(XᵀX) / in, the ridge solution is W = (XᵀX + λI)⁻¹ XᵀY, and the best map of rank r is W V Vᵀ, V the
top right singular vectors of (XᵀX + λI)^½ W (reduced-rank regression: Izenman 1975).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxsteer.interventions.low_rank import ACTIVATION_FUNCTIONS, check_activation, check_rank
from jaxsteer.types import Array

HIGHEST = jax.lax.Precision.HIGHEST
Form = Literal["linear", "affine"]


@partial(jax.tree_util.register_dataclass, data_fields=["triangle"], meta_fields=["n_in"])
@dataclass(frozen=True)
class Factor:
    """R of the tokens so far, upper triangular [1 + in + out, 1 + in + out], and the width of X (static)."""

    triangle: Array
    n_in: int

    @property
    def n_out(self) -> int:
        """The width of Y."""
        return self.triangle.shape[-1] - 1 - self.n_in


class Fit(NamedTuple):
    """h ↦ write · read h + bias: read [R, in], write [out, R], bias [out]."""

    read: Array
    write: Array
    bias: Array

    def __call__(self, h: Array) -> Array:
        """The shifts [..., out] of h [..., in]."""
        shift = jnp.einsum("...r,dr->...d", jnp.einsum("...d,rd->...r", h, self.read), self.write)
        return shift + self.bias.reshape((1,) * (h.ndim - 1) + self.bias.shape)


def empty(n_in: int, n_out: int, dtype: jnp.dtype = jnp.float32) -> Factor:
    """The factor of no tokens."""
    size = 1 + n_in + n_out
    return Factor(jnp.zeros((size, size), dtype), n_in)


def absorb(factor: Factor, x: Array, y: Array, weights: Array | None = None) -> Factor:
    """The factor with more tokens.

    Args:
        x: [..., in]. y: [..., out]. weights: [...], how much a token counts (0 for padding); by default all the same.
    """
    size, dtype = factor.triangle.shape[0], factor.triangle.dtype
    n_in, n_out = factor.n_in, factor.n_out
    if x.shape[:-1] != y.shape[:-1] or (x.shape[-1], y.shape[-1]) != (n_in, n_out):
        raise ValueError(
            f"a factor of maps from {n_in} to {n_out} dimensions cannot take tokens {x.shape} and {y.shape}"
        )
    rows = jnp.concatenate([jnp.ones((*x.shape[:-1], 1), dtype), x.astype(dtype), y.astype(dtype)], axis=-1)
    if weights is not None:
        root = jnp.sqrt(weights.astype(dtype))[..., None]
        rows = jnp.where(root > 0, rows, 0) * root
    return replace(factor, triangle=_triangle(jnp.concatenate([factor.triangle, rows.reshape(-1, size)])))


def join(one: Factor, other: Factor) -> Factor:
    """The factor of both factors' tokens."""
    return replace(one, triangle=_triangle(jnp.concatenate([one.triangle, other.triangle])))


def fit(factor: Factor, form: Form = "linear", rank: int | None = None, ridge: float = 1e-6) -> Fit:
    """The best map in least squares.

    Args:
        form: linear (no bias) or affine.
        rank: the most directions; None = no limit.
        ridge: λ as a share of the mean square of an input.

    Raises:
        ValueError: a rank above the widths, an unknown form.
    """
    n_in, n_out = factor.n_in, factor.n_out
    rank = min(n_in, n_out) if rank is None else rank
    check_rank(rank, n_in, n_out)
    if form not in ("linear", "affine"):
        raise ValueError(f"unknown form {form!r} of a fit: linear or affine")
    rxx, rxy = _ridged(factor, form, ridge)
    # Ŷ = Q Rxy: its right singular vectors are those of Rxy.
    _, _, top = jnp.linalg.svd(rxy, full_matrices=False)
    write = top[:rank].T
    solved = jax.scipy.linalg.solve_triangular(rxx, jnp.matmul(rxy, write, precision=HIGHEST))
    bias = jnp.zeros(n_out, write.dtype)
    if form == "affine":
        x_mean, y_mean = _means(factor)
        bias = y_mean - jnp.matmul(write, jnp.matmul(solved.T, x_mean, precision=HIGHEST), precision=HIGHEST)
    return Fit(solved.T, write, bias)


def mean_shift(factor: Factor) -> Fit:
    """The best constant: the mean of Y (the fixed steering vector). Of rank 1, reading nothing."""
    _, y_mean = _means(factor)
    n_in = factor.n_in
    return Fit(jnp.zeros((1, n_in), y_mean.dtype), jnp.zeros((y_mean.shape[0], 1), y_mean.dtype), y_mean)


def gains(factor: Factor, form: Form = "linear", ridge: float = 1e-6) -> Array:
    """The share of ΣY² that each further rank of the best map explains, descending, [min(in, out)].

    Their running sum is the share that the best map of each rank explains (of the ridge's objective); an affine map's
    bias explains `mean_share` besides.
    """
    _, rxy = _ridged(factor, form, ridge)
    return jnp.linalg.svd(rxy, compute_uv=False) ** 2 / energy(factor)


def mean_share(factor: Factor) -> Array:
    """The share of ΣY² that the mean of Y explains. Scalar."""
    n_in = factor.n_in
    return jnp.sum(factor.triangle[0, 1 + n_in :] ** 2) / energy(factor)


def energy(factor: Factor) -> Array:
    """ΣY², floored so that it can be divided by. Scalar."""
    y = factor.triangle[:, 1 + factor.n_in :]
    return jnp.maximum(jnp.sum(y**2), jnp.finfo(y.dtype).tiny)


def unexplained(factor: Factor, found: Fit) -> Array:
    """Σ(Y − fit(X))² / ΣY² over the factor's tokens. Scalar."""
    n_in = factor.n_in
    one, x, y = jnp.split(factor.triangle, [1, 1 + n_in], axis=1)
    shift = jnp.matmul(jnp.matmul(x, found.read.T, precision=HIGHEST), found.write.T, precision=HIGHEST)
    return jnp.sum((y - shift - one * found.bias[None]) ** 2) / energy(factor)


def target_factor(factor: Factor, *, centred: bool = False) -> Array:
    """A triangle [out, out] with the singular values and right singular vectors of Y, or of Y less its mean."""
    rows = factor.triangle[int(centred) :, 1 + factor.n_in :]
    return _triangle(rows)


class Sample(NamedTuple):
    """Tokens drawn uniformly, without replacement, from those that streamed by: x [n, in], y [n, out].

    priority [n]: a random number for each, of which the highest stay; −∞ where there is no token (yet).
    """

    x: Array
    y: Array
    priority: Array


def empty_sample(size: int, n_in: int, n_out: int) -> Sample:
    """Room for `size` tokens."""
    return Sample(jnp.zeros((size, n_in)), jnp.zeros((size, n_out)), jnp.full(size, -jnp.inf))


def draw(sample: Sample, key: Array, x: Array, y: Array, mask: Array) -> Sample:
    """The sample, with its share of more tokens x [..., in] and y [..., out], of those where mask [...] holds."""
    priority = jnp.where(mask, jax.random.uniform(key, mask.shape), -jnp.inf)
    flat = lambda values: values.reshape(-1, values.shape[-1]).astype(jnp.float32)
    new = Sample(flat(x), flat(y), priority.reshape(-1))
    both = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), sample, new)
    _, best = jax.lax.top_k(both.priority, sample.priority.shape[0])
    return jax.tree.map(lambda field: field[best], both)


@partial(jax.jit, static_argnames=("rank", "activation", "steps", "starts"))
def fit_nonlinear(
    factor: Factor,
    sample: Sample,
    rank: int,
    activation: str = "silu",
    *,
    ridge: float = 1e-6,
    steps: int = 200,
    starts: int = 4,
) -> Fit:
    """The best y ≈ U act(D x) that descent finds: a `Fit` to be used with the activation between read and write.

    Variable projection: U has a closed form for every D, so L-BFGS searches for D alone, in coordinates in which the
    tokens are white. It starts from the linear fit of the same rank, which the activation bends, at several strengths
    and with random signs (act is not odd: z and −z bend it apart); the best end wins.

    Args:
        factor: of all tokens; gives the linear fit and the scales. sample: of them; what the descent sees.
        rank, activation: of the form. ridge: as in `fit`.
        steps: of L-BFGS. starts: number of starting points.
    """
    check_activation(activation)
    check_rank(rank, factor.n_in, factor.n_out)
    act = ACTIVATION_FUNCTIONS[activation]
    rxx, rxy = _ridged(factor, "linear", ridge)
    root = jnp.sqrt(jnp.maximum(factor.triangle[0, 0] ** 2, 1))
    there = (sample.priority > -jnp.inf)[:, None]
    white = root * jax.scipy.linalg.solve_triangular(rxx, sample.x.T, trans=1).T
    white, y = jnp.where(there, white, 0), jnp.where(there, sample.y, 0)
    scale = jnp.maximum(jnp.sum(y**2), jnp.finfo(y.dtype).tiny)

    def write_of(read: Array) -> tuple[Array, Array]:
        features = jnp.where(there, act(jnp.matmul(white, read.T, precision=HIGHEST)), 0)
        gram = jnp.matmul(features.T, features, precision=HIGHEST)
        gram = gram + (1e-6 * jnp.trace(gram) / rank + 1e-12) * jnp.eye(rank)
        return features, jnp.linalg.solve(gram, jnp.matmul(features.T, y, precision=HIGHEST))

    def loss(read: Array) -> Array:
        features, write = write_of(read)
        # At its best U the loss is flat in it: the gradient needs no derivative of the solution.
        return jnp.sum((y - jnp.matmul(features, jax.lax.stop_gradient(write), precision=HIGHEST)) ** 2) / scale

    descend = optax.lbfgs()

    def step(carry: tuple, _: None) -> tuple[tuple, None]:
        read, state = carry
        value, gradient = optax.value_and_grad_from_state(loss)(read, state=state)
        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
            updates, state = descend.update(gradient, state, read, value=value, grad=gradient, value_fn=loss)
        return (optax.apply_updates(read, updates), state), None

    def end(read: Array) -> tuple[Array, Array]:
        (read, _), _ = jax.lax.scan(step, (read, descend.init(read)), None, steps)
        return read, loss(read)

    _, _, top = jnp.linalg.svd(rxy, full_matrices=False)
    begin = jnp.matmul(rxy, top[:rank].T, precision=HIGHEST).T  # the linear fit, in white coordinates
    begin = begin / jnp.maximum(jnp.linalg.norm(begin, axis=1, keepdims=True), 1e-12)
    strengths = 0.1 * 10.0 ** (jnp.arange(starts) / max(1, starts - 1))  # standard deviations of D x, 0.1 to 1
    signs = jnp.where(jax.random.bernoulli(jax.random.key(0), 0.5, (starts, rank)), -1.0, 1.0)
    reads, losses = jax.lax.map(lambda start: end(begin * (start[0] * start[1])[:, None]), (strengths, signs))
    best = reads[jnp.argmin(losses)]
    read = root * jax.scipy.linalg.solve_triangular(rxx, best.T).T
    return Fit(read, write_of(best)[1].T, jnp.zeros(factor.n_out, read.dtype))


def unexplained_nonlinear(sample: Sample, found: Fit, activation: str) -> Array:
    """Σ‖y − U act(D x)‖² / Σ‖y‖² over a sample. Scalar."""
    read = ACTIVATION_FUNCTIONS[activation](jnp.matmul(sample.x, found.read.T, precision=HIGHEST))
    there = (sample.priority > -jnp.inf)[:, None]
    left = jnp.where(there, sample.y - jnp.matmul(read, found.write.T, precision=HIGHEST), 0)
    whole = jnp.sum(jnp.where(there, sample.y, 0) ** 2)
    return jnp.sum(left**2) / jnp.maximum(whole, jnp.finfo(whole.dtype).tiny)


def _triangle(rows: Array) -> Array:
    return jnp.linalg.qr(rows, mode="r")


def _means(factor: Factor) -> tuple[Array, Array]:
    """(mean of X, mean of Y): the first row of R is √n (1, x̄, ȳ), but for its sign."""
    first, n_in = factor.triangle[0], factor.n_in
    root = jnp.where(first[0] == 0, 1, first[0])
    return first[1 : 1 + n_in] / root, first[1 + n_in :] / root


def _ridged(factor: Factor, form: Form, ridge: float) -> tuple[Array, Array]:
    """(Rxx [in, in], Rxy [in, out]) of [X; √λ I | Y; 0], X and Y less their means where the form is affine."""
    n_in, dtype = factor.n_in, factor.triangle.dtype
    rows = factor.triangle[1:, 1:] if form == "affine" else factor.triangle[:, 1:]
    scale = jnp.sum(rows[:, :n_in] ** 2) / n_in
    lam = ridge * scale + jnp.finfo(dtype).tiny
    below = jnp.concatenate(
        [jnp.sqrt(lam) * jnp.eye(n_in, dtype=dtype), jnp.zeros((n_in, rows.shape[1] - n_in), dtype)], 1
    )
    triangle = _triangle(jnp.concatenate([rows, below]))
    return triangle[:n_in, :n_in], triangle[:n_in, n_in:]
