"""Best maps h → Δh from a stream of tokens, in memory that does not grow with their number.

All that least squares needs of tokens X [n, in] and targets Y [n, out] is the triangular factor of a QR decomposition,
R = qr([1 X Y]); with more tokens it becomes qr([R; 1 X Y]). R is a root of the normal equations
(RᵀR = [1 X Y]ᵀ[1 X Y]), which are never formed: where a few directions of a residual stream are a thousand times as
large as the others, their squares would drown the small ones in fp32.

With λ = ridge · tr(XᵀX) / in, the ridge solution is W = (XᵀX + λI)⁻¹ XᵀY, and the best map of rank r is W V Vᵀ, V the
top right singular vectors of (XᵀX + λI)^½ W (reduced-rank regression: Izenman 1975).
"""

from __future__ import annotations

from collections.abc import Callable
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
"""Forms of a map: without and with a bias."""


@partial(jax.tree_util.register_dataclass, data_fields=["triangle"], meta_fields=["n_in"])
@dataclass(frozen=True)
class Factor:
    """The triangular factor of the tokens so far.

    triangle  R, upper triangular, [1 + in + out, 1 + in + out]
    n_in      the width of X, static
    """

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
        factor: of the tokens so far.
        x: tokens [..., in].
        y: targets [..., out].
        weights: [...], of the tokens in the least squares (0 for padding); default 1.

    Raises:
        ValueError: shapes that do not fit the factor.
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
    """The factor of the tokens of both factors."""
    return replace(one, triangle=_triangle(jnp.concatenate([one.triangle, other.triangle])))


def fit(factor: Factor, form: Form = "linear", rank: int | None = None, ridge: float = 1e-6) -> Fit:
    """The map of the least squared error: reduced-rank ridge regression.

    Args:
        factor: of the tokens.
        form: linear (no bias) or affine.
        rank: maximum rank; None = no limit.
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
    """The best constant map, the mean of Y (a fixed steering vector); read and write are zeros of rank 1."""
    _, y_mean = _means(factor)
    n_in = factor.n_in
    return Fit(jnp.zeros((1, n_in), y_mean.dtype), jnp.zeros((y_mean.shape[0], 1), y_mean.dtype), y_mean)


def gains(factor: Factor, form: Form = "linear", ridge: float = 1e-6) -> Array:
    """The share of ΣY² that each further rank of the best map explains, descending, [min(in, out)].

    The cumulative sum is the share that the best map of each rank explains (in the ridge's objective). In an affine map
    the bias explains `mean_share` besides.
    """
    _, rxy = _ridged(factor, form, ridge)
    return jnp.linalg.svd(rxy, compute_uv=False) ** 2 / energy(factor)


def mean_share(factor: Factor) -> Array:
    """The share of ΣY² that the mean of Y explains. Scalar."""
    n_in = factor.n_in
    return jnp.sum(factor.triangle[0, 1 + n_in :] ** 2) / energy(factor)


def energy(factor: Factor) -> Array:
    """ΣY², at least the smallest normal number, so that it can be divided by. Scalar."""
    y = factor.triangle[:, 1 + factor.n_in :]
    return jnp.maximum(jnp.sum(y**2), jnp.finfo(y.dtype).tiny)


def unexplained(factor: Factor, best: Fit) -> Array:
    """Σ(Y − fit(X))² / ΣY² over the factor's tokens. Scalar."""
    n_in = factor.n_in
    one, x, y = jnp.split(factor.triangle, [1, 1 + n_in], axis=1)
    shift = jnp.matmul(jnp.matmul(x, best.read.T, precision=HIGHEST), best.write.T, precision=HIGHEST)
    return jnp.sum((y - shift - one * best.bias[None]) ** 2) / energy(factor)


def target_factor(factor: Factor, *, centred: bool = False) -> Array:
    """A triangle [out, out] with the singular values and right singular vectors of Y, or of Y minus its mean."""
    rows = factor.triangle[int(centred) :, 1 + factor.n_in :]
    return _triangle(rows)


class Sample(NamedTuple):
    """Tokens drawn uniformly, without replacement, from a stream (reservoir sampling by random priorities).

    x         [n, in]
    y         [n, out]
    priority  [n], a random number per token; the highest are kept; −∞ where there is no token (yet)
    """

    x: Array
    y: Array
    priority: Array


def empty_sample(size: int, n_in: int, n_out: int) -> Sample:
    """A sample of up to `size` tokens, none yet."""
    return Sample(jnp.zeros((size, n_in)), jnp.zeros((size, n_out)), jnp.full(size, -jnp.inf))


def draw(sample: Sample, key: Array, x: Array, y: Array, mask: Array) -> Sample:
    """The sample after more tokens x [..., in], y [..., out] have streamed by; only those where mask [...] is true."""
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
    """Fit y ≈ U act(D x) by variable projection: a `Fit` to be used with the activation between read and write.

    U has a closed form for every D, so L-BFGS searches for D alone, in coordinates in which the tokens are white. It
    starts from the linear fit of the same rank, at several scales and with random signs (act is not odd, so z and −z
    differ); the best result wins.

    Args:
        factor: of all tokens; gives the linear fit and the whitening.
        sample: of the same tokens; the loss is computed on it.
        rank: of D and U.
        activation: one of `ACTIVATION_FUNCTIONS`.
        ridge: λ of the linear fit and the whitening, as in `fit`.
        steps: of L-BFGS.
        starts: number of starting points.

    Raises:
        ValueError: an unknown activation, a rank above the widths.
    """
    check_activation(activation)
    check_rank(rank, factor.n_in, factor.n_out)
    rxx, rxy = _ridged(factor, "linear", ridge)
    root = jnp.sqrt(jnp.maximum(factor.triangle[0, 0] ** 2, 1))
    real = (sample.priority > -jnp.inf)[:, None]
    white = root * jax.scipy.linalg.solve_triangular(rxx, sample.x.T, trans=1).T
    problem = _Projection(jnp.where(real, white, 0), jnp.where(real, sample.y, 0), real, activation)

    descend = partial(_minimise, problem.loss, steps=steps)
    begin = _linear_directions(rxy, rank)
    scales = 0.1 * 10.0 ** (jnp.arange(starts) / max(1, starts - 1))  # standard deviations of D x, 0.1 to 1
    signs = jnp.where(jax.random.bernoulli(jax.random.key(0), 0.5, (starts, rank)), -1.0, 1.0)
    reads, losses = jax.lax.map(lambda start: descend(begin * (start[0] * start[1])[:, None]), (scales, signs))
    best = reads[jnp.argmin(losses)]
    read = root * jax.scipy.linalg.solve_triangular(rxx, best.T).T
    return Fit(read, problem.write(best)[1].T, jnp.zeros(factor.n_out, read.dtype))


class _Projection(NamedTuple):
    """The loss of y ≈ U act(D x) as a function of D alone, with the best U for it.

    x           white tokens [n, in]
    y           targets [n, out]
    real        bool [n, 1], where there is a token; x and y are 0 elsewhere
    activation  act
    """

    x: Array
    y: Array
    real: Array
    activation: str

    def write(self, read: Array) -> tuple[Array, Array]:
        """(act(D x) [n, R], the best Uᵀ [R, out]) for D [R, in]."""
        act, rank = ACTIVATION_FUNCTIONS[self.activation], read.shape[0]
        features = jnp.where(self.real, act(jnp.matmul(self.x, read.T, precision=HIGHEST)), 0)
        gram = jnp.matmul(features.T, features, precision=HIGHEST)
        gram = gram + (1e-6 * jnp.trace(gram) / rank + 1e-12) * jnp.eye(rank)
        return features, jnp.linalg.solve(gram, jnp.matmul(features.T, self.y, precision=HIGHEST))

    def loss(self, read: Array) -> Array:
        """Σ‖y − U act(D x)‖² / Σ‖y‖² at the best U."""
        features, write = self.write(read)
        # At its best U the loss is flat in it: the gradient needs no derivative of the solution.
        left = self.y - jnp.matmul(features, jax.lax.stop_gradient(write), precision=HIGHEST)
        return jnp.sum(left**2) / jnp.maximum(jnp.sum(self.y**2), jnp.finfo(self.y.dtype).tiny)


def _linear_directions(rxy: Array, rank: int) -> Array:
    """Unit rows [R, in]: what the linear fit of this rank reads, in white coordinates."""
    _, _, top = jnp.linalg.svd(rxy, full_matrices=False)
    rows = jnp.matmul(rxy, top[:rank].T, precision=HIGHEST).T
    return rows / jnp.maximum(jnp.linalg.norm(rows, axis=1, keepdims=True), 1e-12)


def _minimise(loss: Callable[[Array], Array], start: Array, steps: int) -> tuple[Array, Array]:
    """(argument, value) after some steps of L-BFGS."""
    optimizer = optax.lbfgs()

    def step(carry: tuple, _: None) -> tuple[tuple, None]:
        x, state = carry
        value, gradient = optax.value_and_grad_from_state(loss)(x, state=state)
        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
            updates, state = optimizer.update(gradient, state, x, value=value, grad=gradient, value_fn=loss)
        return (optax.apply_updates(x, updates), state), None

    (x, _), _ = jax.lax.scan(step, (start, optimizer.init(start)), None, steps)
    return x, loss(x)


def unexplained_nonlinear(sample: Sample, best: Fit, activation: str) -> Array:
    """Σ‖y − U act(D x)‖² / Σ‖y‖² over a sample. Scalar."""
    read = ACTIVATION_FUNCTIONS[activation](jnp.matmul(sample.x, best.read.T, precision=HIGHEST))
    real = (sample.priority > -jnp.inf)[:, None]
    left = jnp.where(real, sample.y - jnp.matmul(read, best.write.T, precision=HIGHEST), 0)
    whole = jnp.sum(jnp.where(real, sample.y, 0) ** 2)
    return jnp.sum(left**2) / jnp.maximum(whole, jnp.finfo(whole.dtype).tiny)


def _triangle(rows: Array) -> Array:
    return jnp.linalg.qr(rows, mode="r")


def _means(factor: Factor) -> tuple[Array, Array]:
    """(mean of X, mean of Y): the first row of R is ±√n (1, x̄, ȳ)."""
    first, n_in = factor.triangle[0], factor.n_in
    root = jnp.where(first[0] == 0, 1, first[0])
    return first[1 : 1 + n_in] / root, first[1 + n_in :] / root


def _ridged(factor: Factor, form: Form, ridge: float) -> tuple[Array, Array]:
    """(Rxx [in, in], Rxy [in, out]) of [X; √λ I | Y; 0], with X and Y centred where the form is affine."""
    n_in, dtype = factor.n_in, factor.triangle.dtype
    rows = factor.triangle[1:, 1:] if form == "affine" else factor.triangle[:, 1:]
    scale = jnp.sum(rows[:, :n_in] ** 2) / n_in
    lam = ridge * scale + jnp.finfo(dtype).tiny
    below = jnp.concatenate(
        [jnp.sqrt(lam) * jnp.eye(n_in, dtype=dtype), jnp.zeros((n_in, rows.shape[1] - n_in), dtype)], 1
    )
    triangle = _triangle(jnp.concatenate([rows, below]))
    return triangle[:n_in, :n_in], triangle[:n_in, n_in:]
