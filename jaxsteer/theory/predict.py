"""What will pay, before anything is trained: predictions from the loss's gradients at the base model.

g_t = ∂L/∂y_t, the gradient in a site's value at each token, says where a shift would help. A method can only shift as a
function of what it reads: a fixed vector by one vector for all, a linear one by W y_t. With one norm for all shifts,
Σ‖Δ_t‖² = ε², the most that the loss falls to first order is ε times

    ‖Σ g_t‖ / √n  for a fixed vector,    (Σ_{i ≤ R} σ_i²)^½  for a linear map of rank R,

σ_i² the energies that `jaxsteer.theory.fits.gains` gives for the best fits of −g_t from y_t. One backward pass finds
the gradients at all sites and layers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxsteer.models.config import site_dims
from jaxsteer.models.transformer import Network
from jaxsteer.objective import supervised_loss, total_weight
from jaxsteer.steering import with_leaf
from jaxsteer.theory import fits
from jaxsteer.theory.oracle import SLOT, Replay, check_site
from jaxsteer.types import Array, Batch, Plan, Slot, Steering, Taps

STREAM_SITES = ("attn", "mlp.in", "mlp", "block")


class Promise(NamedTuple):
    """What is to be had at each layer of a site, in squared units of the loss's gradient, summed over the tokens.

    energy  Σ‖g_t‖², what shifts chosen token by token could reach, [L]
    fixed   the part of it that a fixed vector reaches, [L]
    ranks   the part that a linear map of rank 1, 2, ... reaches, [L, D]
    """

    energy: Array
    fixed: Array
    ranks: Array


def site_gradients(network: Network, batch: Batch, sites: Sequence[str]) -> tuple[Taps, Taps]:
    """(y, ∂L/∂y) at the sites, each [L, B, T, D], L the mean loss: one backward pass for all.

    Raises:
        ValueError: an unknown site, or one whose value is not one vector a token.
    """
    config = network.model.config
    for site in sites:
        check_site(site)
        if len(site_dims(config, site).y) != 1:
            raise ValueError(f"site {site!r} has several vectors a token; predictions need a site with one")
    shapes = {site: (config.layers, *batch.tokens.shape, *site_dims(config, site).y) for site in sites}
    shifts = {site: {"shift": jnp.zeros(shape)} for site, shape in shapes.items()}
    probed = network.steered(Slot(SLOT, Replay(), tuple(sites)), shifts)

    def loss(shifts: dict[str, dict[str, Array]]) -> Array:
        steering = {**network.steering, SLOT: shifts}
        total = supervised_loss(probed.model, network.base, steering, batch)
        return total / jnp.maximum(total_weight(batch), 1e-6).astype(total.dtype)

    gradients = jax.grad(loss)(shifts)
    return network(batch, tuple(sites)).taps, {site: gradients[site]["shift"] for site in sites}


def gradient_factors(
    network: Network,
    batches: Iterable[Batch],
    sites: Sequence[str] = STREAM_SITES,
    advance: Callable[[int], None] = lambda done: None,
) -> dict[str, fits.Factor]:
    """For each site, the factors of the maps y_t → −g_t of all layers (a leading axis L); batches stream by.

    Raises:
        ValueError: an unknown site, no batches.
    """
    factors = None
    for done, batch in enumerate(batches, 1):
        factors = _absorb(network, batch, factors, tuple(sites))
        advance(done)
    if factors is None:
        raise ValueError("a prediction needs at least one batch")
    return factors


@partial(jax.jit, static_argnames="sites")
def _absorb(
    network: Network, batch: Batch, factors: dict[str, fits.Factor] | None, sites: tuple[str, ...]
) -> dict[str, fits.Factor]:
    values, gradients = site_gradients(network, batch, sites)
    real = (batch.segments > 0).astype(jnp.float32)
    found = {}
    for site in sites:
        y, g = values[site], gradients[site]
        width, layers = y.shape[-1], y.shape[0]
        if factors is None:
            start = jnp.zeros((layers, 1 + 2 * width, 1 + 2 * width))
            factor = fits.Factor(start, width)
        else:
            factor = factors[site]
        found[site] = jax.lax.map(lambda xs: fits.absorb(xs[0], xs[1], -xs[2], real), (factor, y, g))
    return found


@partial(jax.jit, static_argnames="ridge")
def promise(factor: fits.Factor, ridge: float = 1e-3) -> Promise:
    """What a site promises, from its factors of all layers.

    Args:
        ridge: λ as a share of the mean square of what is read. Not small: with few tokens for many dimensions, a map
            that is free to do so fits each token.
    """

    def one(factor: fits.Factor) -> Promise:
        energy = fits.energy(factor)
        return Promise(energy, energy * fits.mean_share(factor), energy * jnp.cumsum(fits.gains(factor, ridge=ridge)))

    return jax.lax.map(one, factor)


def aligned_start(plan: Plan, steering: Steering, factors: dict[str, fits.Factor], ridge: float = 1e-3) -> Steering:
    """A fresh steering tree whose D reads what the gradient asks for; U stays zero, so it is still the base model.

    In each block, D becomes the rows that the best rank-R map y → −g reads, made as long as D's own rows are: the first
    step of U then goes where the loss falls fastest. Slots without D and U, and sites without a factor, stay.

    Args:
        plan, steering: freshly drawn. factors: of `gradient_factors`, at the sites to be aligned.
        ridge: as in `promise`.

    Raises:
        ValueError: nothing in the plan that could be aligned.
    """
    done = 0
    for slot in plan:
        for site in slot.sites:
            p = steering[slot.name][site]
            if site not in factors or not {"D", "U"} <= set(p):
                continue
            layers = slot.active_layers(factors[site].triangle.shape[0])
            rows = _aligned(factors[site], np.asarray(layers), p["D"].shape[1], ridge)
            length = jnp.linalg.norm(p["D"], axis=-1, keepdims=True)
            rows = rows / jnp.maximum(jnp.linalg.norm(rows, axis=-1, keepdims=True), 1e-30) * length
            steering = with_leaf(steering, (slot.name, site, "D"), rows.astype(p["D"].dtype))
            done += 1
    if not done:
        raise ValueError(
            f"nothing to align: no slot of {[slot.name for slot in plan]} has D and U at one of {sorted(factors)}"
        )
    return steering


def _aligned(factor: fits.Factor, layers: np.ndarray, rank: int, ridge: float) -> Array:
    chosen = jax.tree.map(lambda leaf: leaf[layers], factor)
    return jax.jit(lambda f: jax.lax.map(lambda one: fits.fit(one, "linear", rank, ridge).read, f))(chosen)
