"""Weight updates as activation shifts: exact, to first order, to any order, and how far each order carries.

With f(θ) the values at the sites and δ an update of θ = (base, steering):

    exact         f(θ + s δ) − f(θ)
    first order   s f'(θ)[δ]                             one jvp, all layers at once
    order n       Σ_{k ≤ n} sᵏ/k! · f⁽ᵏ⁾(θ)[δ, ..., δ]   nested jvps; the remainder shrinks like sⁿ⁺¹
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from jaxsteer.models.transformer import Model, forward
from jaxsteer.params import Params, combine
from jaxsteer.sharding import current_platform
from jaxsteer.theory.update import complete, moved, split_at
from jaxsteer.types import SITES, Array, Batch, Taps


class Remainders(NamedTuple):
    """Energies of a shift and of what its expansion leaves, Σ ‖·‖² over tokens that are not padding; add over batches.

    scales     [S], factors on the update
    shift      {site: [S, L]}, energy of the exact shift
    remainder  {site: [N, S, L]}, energy of the exact shift minus its expansion to order 1, ..., N
    """

    scales: Array
    shift: dict[str, Array]
    remainder: dict[str, Array]


def shift(
    model: Model, at: Params, update: Params, batch: Batch, sites: Sequence[str], scale: Array | float = 1.0
) -> Taps:
    """f(θ + s δ) − f(θ): the exact change at every site, layer and token of a finite update.

    Args:
        model: static. Forward mode needs one of XLA's attention kernels; "auto" picks one here.
        at: θ, the whole base and steering trees.
        update: δ, a change of some of their leaves, see `jaxsteer.theory.update`.
        batch: [B, T]. Values at padding are meaningless.
        sites: whose values are compared; static.
        scale: s, a factor on the update.

    Returns:
        {site: [L, B, T, ...]}, at least fp32.

    Raises:
        ValueError: an unknown site, or an update that does not fit the trees.
    """
    f, point, update = _curve(model, at, update, batch, sites)
    return jax.tree.map(jnp.subtract, f(moved(point, update, scale)), f(point))


def first_order(model: Model, at: Params, update: Params, batch: Batch, sites: Sequence[str]) -> Taps:
    """f'(θ)[δ]: the shift to first order, at all layers, by one jvp. Arguments and result as for `shift`."""
    return higher_order(model, at, update, batch, sites, order=1)[0]


def higher_order(
    model: Model, at: Params, update: Params, batch: Batch, sites: Sequence[str], order: int
) -> tuple[Taps, ...]:
    """The terms f⁽ᵏ⁾(θ)[δ, ..., δ]/k! for k = 1, ..., order; at scale s, term k is multiplied by sᵏ.

    By nested jvps through scan and rematerialisation: order n costs 2ⁿ forward passes, in one compiled program.

    Args:
        model, at, update, batch, sites: as for `shift`.
        order: n, at least 1; static.

    Returns:
        A tuple of terms, each {site: [L, B, T, ...]}.

    Raises:
        ValueError: an order below 1; as for `shift`.
    """
    if order < 1:
        raise ValueError(f"order {order}: an expansion of the shift needs an order of at least 1")
    f, point, update = _curve(model, at, update, batch, sites)

    def differentiated(lower: Callable) -> Callable:
        """(f, ..., f⁽ᵏ⁾) -> (f, ..., f⁽ᵏ⁺¹⁾), each along the update."""

        def derivatives(point: Params) -> tuple[Taps, ...]:
            values, dots = jax.jvp(lower, (point,), (update,))
            return (*values, dots[-1])

        return derivatives

    series: Callable = lambda point: (f(point),)
    for _ in range(order):
        series = differentiated(series)
    _, *derivatives = series(point)
    return tuple(jax.tree.map(lambda d, k=k: d / math.factorial(k), taps) for k, taps in enumerate(derivatives, 1))


def remainders(
    model: Model, at: Params, update: Params, batch: Batch, terms: Sequence[Taps], scales: ArrayLike
) -> Remainders:
    """How much of the shift the expansion leaves, order by order, at each scale of the update.

    Args:
        model, at, update, batch: as for `shift`.
        terms: of orders 1, ..., N at some sites, from `higher_order` with the same arguments.
        scales: [S] factors on the update.

    Raises:
        ValueError: no terms; as for `shift`.
    """
    if not terms:
        raise ValueError("no terms of the expansion: give those of `higher_order`")
    f, point, update = _curve(model, at, update, batch, tuple(terms[0]))
    here = f(point)

    def at_scale(scale: Array) -> tuple[dict[str, Array], dict[str, Array]]:
        rest = jax.tree.map(jnp.subtract, f(moved(point, update, scale)), here)
        whole, left = energy(rest, batch), []
        for k, term in enumerate(terms, 1):
            rest = jax.tree.map(lambda r, t, k=k: r - (scale**k).astype(t.dtype) * t, rest, term)
            left.append(energy(rest, batch))
        return whole, jax.tree.map(lambda *each: jnp.stack(each), *left)

    factors = jnp.asarray(scales)
    whole, left = jax.lax.map(at_scale, factors)
    return Remainders(factors, whole, jax.tree.map(lambda e: e.swapaxes(0, 1), left))


def energy(taps: Taps, batch: Batch) -> dict[str, Array]:
    """Σ ‖·‖² over the tokens that are not padding, {site: [L]}; additive over batches."""

    def of(tap: Array) -> Array:
        squares = jnp.sum(jnp.square(tap), axis=tuple(range(3, tap.ndim)))
        return jnp.einsum("lbt,bt->l", squares, (batch.segments > 0).astype(squares.dtype))

    return jax.tree.map(of, taps)


def explained(measured: Remainders, order: int = 1) -> dict[str, Array]:
    """1 − ‖remainder of order n‖² / ‖exact shift‖², {site: [S, L]}: the share of the shift that order n explains.

    At most 1; negative where the expansion is further off than no shift at all; NaN where nothing shifts.

    Raises:
        ValueError: the order was not measured.
    """
    highest = min(left.shape[0] for left in measured.remainder.values())
    if not 1 <= order <= highest:
        raise ValueError(f"order {order}: orders 1 to {highest} were measured")
    return {site: 1 - measured.remainder[site][order - 1] / measured.shift[site] for site in measured.shift}


def reach(scales: ArrayLike, share: ArrayLike, level: float = 0.9) -> Array:
    """The scale up to which a share stays at `level` or above, interpolated on a log axis.

    Args:
        scales: [S], ascending.
        share: [S, ...].
        level: the threshold.

    Returns:
        [...]; inf where the share stays above on all scales, 0 where it is below on the smallest.
    """
    shares, log = jnp.asarray(share), jnp.log(jnp.asarray(scales))
    low = ~(shares >= level)
    first = jnp.argmax(low, axis=0)
    pick = lambda index: jnp.take_along_axis(shares, index[None], axis=0)[0]
    before = jnp.maximum(first - 1, 0)
    high, under = pick(before), pick(first)
    fraction = (high - level) / jnp.where(high > under, high - under, 1)
    crossing = jnp.exp(log[before] + fraction * (log[first] - log[before]))
    return jnp.where(jnp.any(low, axis=0), jnp.where(first == 0, 0.0, crossing), jnp.inf)


def log_slope(scales: ArrayLike, sizes: ArrayLike) -> Array:
    """The power at which sizes grow, by least squares of log size on log scale: [S] and [S, ...] -> [...]."""
    x = jnp.log(jnp.asarray(scales))
    x = x - jnp.mean(x)
    return jnp.einsum("s,s...->...", x, jnp.log(jnp.asarray(sizes)).astype(x.dtype)) / jnp.vdot(x, x)


def _curve(
    model: Model, at: Params, update: Params, batch: Batch, sites: Sequence[str]
) -> tuple[Callable[[Params], Taps], Params, Params]:
    """(f, the leaves that change, their change): f maps those leaves to the values at the sites, at least fp32."""
    update = complete(update, at)
    captured = check_sites(sites)
    point, fixed = split_at(at, update)
    model = forward_mode(replace(model, train_base=bool(jax.tree.leaves(update.base))))

    def f(changed: Params) -> Taps:
        taps = forward(model, *combine(changed, fixed), batch, capture=captured).taps
        return jax.tree.map(lambda tap: tap.astype(np.promote_types(tap.dtype, np.float32)), taps)

    return f, point, update


def check_sites(sites: Sequence[str]) -> tuple[str, ...]:
    """The sites without repetition, as `forward` captures them; a text is one site.

    Raises:
        ValueError: no site, or an unknown one.
    """
    if isinstance(sites, str):
        sites = (sites,)
    unknown = [site for site in sites if site not in SITES]
    if unknown or not sites:
        got = f"no site {unknown[0]!r}" if unknown else "needs at least one site"
        raise ValueError(f"{got}: the sites are {', '.join(SITES)}")
    return tuple(dict.fromkeys(sites))


def forward_mode(model: Model) -> Model:
    """The model with an attention kernel that supports forward-mode derivatives.

    Raises:
        ValueError: the model asks for a kernel with a custom derivative rule.
    """
    if model.attention in ("cudnn", "splash"):
        raise ValueError(
            f"attention {model.attention!r} has no forward-mode derivative; use Model(attention='auto') or one of "
            "rows, dense, chunked"
        )
    if model.attention == "auto" and current_platform() != "cpu":
        return replace(model, attention="chunked")
    return model
