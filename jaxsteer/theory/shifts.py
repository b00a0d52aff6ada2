"""Weight updates as activation shifts: exact, to first order, to any order, and how far each order carries.

With f(θ) the values at the sites and δ an update of θ = (base, steering):

    exact         f(θ + s δ) − f(θ)
    first order   s f'(θ)[δ]                             one jvp, all layers at once
    order n       Σ_{k ≤ n} sᵏ/k! · f⁽ᵏ⁾(θ)[δ, ..., δ]   nested jvps; what is left shrinks like sⁿ⁺¹
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
    """Energies of a shift and of what its expansion leaves, Σ ‖·‖² over the real tokens; add them over batches.

    scales     [S], factors on the update
    shift      {site: [S, L]}, of the exact shift
    remainder  {site: [N, S, L]}, of the exact shift minus its expansion to order 1, ..., N
    """

    scales: Array
    shift: dict[str, Array]
    remainder: dict[str, Array]


def shift(
    model: Model, at: Params, update: Params, batch: Batch, sites: Sequence[str], scale: Array | float = 1.0
) -> Taps:
    """f(θ + s δ) − f(θ): the exact change at every site, layer and token of a finite update.

    Args:
        model: static. Forward mode passes through XLA's attention kernels alone; "auto" takes one of them here.
        at: θ, the whole base and steering trees.
        update: δ, a change of some of their leaves, see `jaxsteer.theory.update`.
        batch: [B, T]. What stands at padding means nothing.
        sites: whose values are compared.
        scale: s, a factor on the update.

    Returns:
        {site: [L, B, T, ...]}, at least fp32.

    Raises:
        ValueError: an unknown site, or an update that does not fit the trees.
    """
    f, point, update = _curve(model, at, update, batch, sites)
    return jax.tree.map(jnp.subtract, f(moved(point, update, scale)), f(point))


def first_order(model: Model, at: Params, update: Params, batch: Batch, sites: Sequence[str]) -> Taps:
    """f'(θ)[δ]: the shift to first order, at all layers by one jvp. Arguments and result as for `shift`."""
    return higher_order(model, at, update, batch, sites, order=1)[0]


def higher_order(
    model: Model, at: Params, update: Params, batch: Batch, sites: Sequence[str], order: int
) -> tuple[Taps, ...]:
    """The terms f⁽ᵏ⁾(θ)[δ, ..., δ]/k! for k = 1, ..., order; at scale s term k counts sᵏ.

    By nested jvps through scan and rematerialisation: order n costs 2ⁿ forward passes, in one compiled program.

    Raises:
        ValueError: an order below 1; as for `shift`.
    """
    if order < 1:
        raise ValueError(f"order {order}: an expansion of the shift needs an order of at least 1")
    f, point, update = _curve(model, at, update, batch, sites)

    def further(lower: Callable) -> Callable:
        """(f, ..., f⁽ᵏ⁾) -> (f, ..., f⁽ᵏ⁺¹⁾), each along the update."""

        def derivatives(point: Params) -> tuple[Taps, ...]:
            values, dots = jax.jvp(lower, (point,), (update,))
            return (*values, dots[-1])

        return derivatives

    all_of: Callable = lambda point: (f(point),)
    for _ in range(order):
        all_of = further(all_of)
    _, *derivatives = all_of(point)
    return tuple(jax.tree.map(lambda d, k=k: d / math.factorial(k), each) for k, each in enumerate(derivatives, 1))


def remainders(
    model: Model, at: Params, update: Params, batch: Batch, terms: Sequence[Taps], scales: ArrayLike
) -> Remainders:
    """How much of the shift the expansion leaves unexplained, order by order, at each scale of the update.

    Args:
        terms: of orders 1, ..., N at some sites, as `higher_order` gives them for the same arguments.
        scales: [S] factors on the update. Others as for `shift`.

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
    """Σ ‖·‖² over the real tokens, {site: [L]}; additive over batches."""

    def of(tap: Array) -> Array:
        squares = jnp.sum(jnp.square(tap), axis=tuple(range(3, tap.ndim)))
        return jnp.einsum("lbt,bt->l", squares, (batch.segments > 0).astype(squares.dtype))

    return jax.tree.map(of, taps)


def explained(found: Remainders, order: int = 1) -> dict[str, Array]:
    """1 − ‖what order n leaves‖² / ‖exact shift‖², {site: [S, L]}: the share of the shift that the order explains.

    At most 1; negative where the expansion is further off than no shift at all; NaN where nothing shifts.

    Raises:
        ValueError: an order that was not measured.
    """
    highest = min(left.shape[0] for left in found.remainder.values())
    if not 1 <= order <= highest:
        raise ValueError(f"order {order}: orders 1 to {highest} were measured")
    return {site: 1 - found.remainder[site][order - 1] / found.shift[site] for site in found.shift}


def reach(scales: ArrayLike, share: ArrayLike, level: float = 0.9) -> Array:
    """The scale up to which a share stays at `level` or above, interpolated on a log axis. [S] and [S, ...] -> [...].

    inf where it stays so on all scales, 0 where the smallest scale is below already.
    """
    shares, log = jnp.asarray(share), jnp.log(jnp.asarray(scales))
    low = ~(shares >= level)
    first = jnp.argmax(low, axis=0)
    pick = lambda index: jnp.take_along_axis(shares, index[None], axis=0)[0]
    before = jnp.maximum(first - 1, 0)
    high, under = pick(before), pick(first)
    way = (high - level) / jnp.where(high > under, high - under, 1)
    crossing = jnp.exp(log[before] + way * (log[first] - log[before]))
    return jnp.where(jnp.any(low, axis=0), jnp.where(first == 0, 0.0, crossing), jnp.inf)


def log_slope(scales: ArrayLike, sizes: ArrayLike) -> Array:
    """The least-squares slope of log sizes over log scales, the power at which they grow: [S] and [S, ...] -> [...]."""
    x = jnp.log(jnp.asarray(scales))
    x = x - jnp.mean(x)
    return jnp.einsum("s,s...->...", x, jnp.log(jnp.asarray(sizes)).astype(x.dtype)) / jnp.vdot(x, x)


def _curve(
    model: Model, at: Params, update: Params, batch: Batch, sites: Sequence[str]
) -> tuple[Callable[[Params], Taps], Params, Params]:
    """(f, the leaves that change, by how much): f takes those leaves to the values at the sites, at least fp32."""
    update = complete(update, at)
    captured = check_sites(sites)
    point, still = split_at(at, update)
    model = forward_mode(replace(model, train_base=bool(jax.tree.leaves(update.base))))

    def f(changed: Params) -> Taps:
        taps = forward(model, *combine(changed, still), batch, capture=captured).taps
        return jax.tree.map(lambda tap: tap.astype(np.promote_types(tap.dtype, np.float32)), taps)

    return f, point, update


def check_sites(sites: Sequence[str]) -> tuple[str, ...]:
    """The sites as `forward` captures them.

    Raises:
        ValueError: none, or one that no model has.
    """
    if isinstance(sites, str):
        sites = (sites,)
    unknown = [site for site in sites if site not in SITES]
    if unknown or not sites:
        got = f"no site {unknown[0]!r}" if unknown else "needs at least one site"
        raise ValueError(f"{got}: the sites are {', '.join(SITES)}")
    return tuple(dict.fromkeys(sites))


def forward_mode(model: Model) -> Model:
    """The model with an attention kernel that forward-mode derivatives pass through.

    Raises:
        ValueError: a kernel with a derivative rule of its own was asked for.
    """
    if model.attention in ("cudnn", "splash"):
        raise ValueError(
            f"attention {model.attention!r} has no forward-mode derivative; use Model(attention='auto') or one of "
            "rows, dense, chunked"
        )
    if model.attention == "auto" and current_platform() != "cpu":
        return replace(model, attention="chunked")
    return model
