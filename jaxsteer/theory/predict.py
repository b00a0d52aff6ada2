"""Which layers and sites are worth steering: predictions from the loss's gradients at the base model.

g_t = ∂L/∂y_t, the gradient in a site's value at each token, says where a shift would help. A method can only shift as a
function of what it reads: a fixed vector shifts all tokens alike, a linear map by W y_t. Among shifts of one norm,
Σ‖Δ_t‖² = ε², the loss falls to first order by at most ε times

    ‖Σ g_t‖ / √n  for a fixed vector,    (Σ_{i ≤ R} σ_i²)^½  for a linear map of rank R,

with σ_i² the energies that `jaxsteer.theory.fits.gains` gives for the best fits of −g_t from y_t. One backward pass
gives the gradients at all sites and layers.
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
from jaxsteer.objectives.supervised import supervised_loss
from jaxsteer.objectives.tokens import total_weight
from jaxsteer.steering import with_leaf
from jaxsteer.theory import fits
from jaxsteer.theory.oracle import SLOT, Replay, check_site
from jaxsteer.types import Array, Batch, Plan, Slot, Steering, Taps

STREAM_SITES = ("attn", "mlp.in", "mlp", "block")
"""Sites with one vector per token, of the residual stream's width."""


class Promise(NamedTuple):
    """What steering could gain at each layer of a site: energies of the loss's gradient, summed over the tokens.

    energy  Σ‖g_t‖², within reach of a shift chosen for every token, [L]
    fixed   the part within reach of a fixed vector, [L]
    ranks   the part within reach of a linear map of rank 1, 2, ..., [L, D]
    """

    energy: Array
    fixed: Array
    ranks: Array


def site_gradients(network: Network, batch: Batch, sites: Sequence[str]) -> tuple[Taps, Taps]:
    """Values and gradients of the mean loss at the sites of every layer, by one backward pass.

    Args:
        network: where the gradients are taken.
        batch: [B, T].
        sites: static.

    Returns:
        (y, ∂loss/∂y), each {site: [L, B, T, D]}.

    Raises:
        ValueError: an unknown site, or one with several vectors per token.
    """
    config = network.model.config
    for site in sites:
        check_site(site)
        if len(site_dims(config, site).y) != 1:
            raise ValueError(f"site {site!r} has several vectors per token; predictions need a site with one")
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
    """Factors for fitting the maps y_t → −g_t at every layer of the sites.

    Args:
        network: where the gradients are taken.
        batches: of one shape; each is used once.
        sites: of `STREAM_SITES`.
        advance: callback after every batch, with the number of batches done.

    Returns:
        {site: factors with a leading axis over the layers}

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
    absorbed = {}
    for site in sites:
        y, g = values[site], gradients[site]
        layers, width = y.shape[0], y.shape[-1]
        none = fits.Factor(jnp.zeros((layers, 1 + 2 * width, 1 + 2 * width)), width)
        factor = none if factors is None else factors[site]
        absorbed[site] = jax.lax.map(lambda xs: fits.absorb(xs[0], xs[1], -xs[2], real), (factor, y, g))
    return absorbed


@partial(jax.jit, static_argnames="ridge")
def promise(factor: fits.Factor, ridge: float = 1e-3) -> Promise:
    """What a site promises, layer by layer.

    Args:
        factor: of the site, from `gradient_factors`.
        ridge: λ as a share of the mean square of an input; static. Not small: with few tokens for many dimensions, an
            unrestricted map fits each token.
    """

    def one(factor: fits.Factor) -> Promise:
        energy = fits.energy(factor)
        return Promise(energy, energy * fits.mean_share(factor), energy * jnp.cumsum(fits.gains(factor, ridge=ridge)))

    return jax.lax.map(one, factor)


def aligned_start(plan: Plan, steering: Steering, factors: dict[str, fits.Factor], ridge: float = 1e-3) -> Steering:
    """Align D of freshly initialised steering with the gradient; U stays zero, so it is still the base model.

    In each layer D becomes the rows that the best rank-R map y → −g reads, with the norms of D's own rows: the first
    step of U then goes where the loss falls fastest. Slots without D and U, and sites without a factor, do not change.

    Args:
        plan: the plan.
        steering: its tree, freshly initialised.
        factors: from `gradient_factors`, at the sites to align.
        ridge: as in `promise`.

    Raises:
        ValueError: the plan has nothing to align.
    """
    aligned = 0
    for slot in plan:
        for site in slot.sites:
            p = steering[slot.name][site]
            if site not in factors or not {"D", "U"} <= set(p):
                continue
            layers = slot.active_layers(factors[site].triangle.shape[0])
            rows = _aligned(factors[site], np.asarray(layers), p["D"].shape[1], ridge)
            norms = jnp.linalg.norm(p["D"], axis=-1, keepdims=True)
            rows = rows / jnp.maximum(jnp.linalg.norm(rows, axis=-1, keepdims=True), 1e-30) * norms
            steering = with_leaf(steering, (slot.name, site, "D"), rows.astype(p["D"].dtype))
            aligned += 1
    if not aligned:
        raise ValueError(
            f"nothing to align: no slot of {[slot.name for slot in plan]} has D and U at one of {sorted(factors)}"
        )
    return steering


def _aligned(factor: fits.Factor, layers: np.ndarray, rank: int, ridge: float) -> Array:
    """What the best map of this rank reads in each of the layers, [A, R, D]."""
    chosen = jax.tree.map(lambda leaf: leaf[layers], factor)
    return jax.jit(lambda f: jax.lax.map(lambda one: fits.fit(one, "linear", rank, ridge).read, f))(chosen)
