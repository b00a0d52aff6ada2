"""Spectra of shifts and updates, and principal angles between the subspaces that they span.

A subspace is given by R rows that span it, [..., R, D]; leading axes (layers) are batch axes.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import jax.numpy as jnp

from jaxsteer.interventions import LinearSteering, LoRA, NonlinearSteering
from jaxsteer.orthogonality import HIGHEST, Bundle
from jaxsteer.types import Array, Plan, Steering

Side = Literal["reads", "writes"]
"""Which directions of a method: those that it reads from the residual stream, or those that it writes to it."""


def effective_rank(values: Array) -> Array:
    """exp(−Σ p log p) with p = σ² / Σσ²: the number of directions that the energy is spread over.

    1 where one direction has all the energy, R where all have the same (Roy & Vetterli 2007, there with σ in place of
    σ²); 0 where all are zero.

    Args:
        values: singular values [..., R].

    Returns:
        [...]
    """
    energy = values**2
    whole = jnp.sum(energy, axis=-1, keepdims=True)
    share = energy / jnp.where(whole > 0, whole, 1)
    # Not xlogy: its gradient at a share of 0 is NaN.
    entropy = -jnp.sum(share * jnp.log(jnp.where(share > 0, share, 1)), axis=-1)
    return jnp.where(whole[..., 0] > 0, jnp.exp(entropy), 0)


def captured(values: Array) -> Array:
    """The share of the energy in the first 1, 2, ... of descending singular values: [..., R] -> [..., R]."""
    energy = jnp.cumsum(values**2, axis=-1)
    whole = energy[..., -1:]
    return energy / jnp.where(whole > 0, whole, 1)


def directions_for(values: Array, share: float = 0.9) -> Array:
    """The number of leading directions that hold this share of the energy: [..., R] -> int [...].

    Raises:
        ValueError: the share is not above 0 and at most 1.
    """
    if not 0 < share <= 1:
        raise ValueError(f"a share of the energy must be above 0 and at most 1, got {share}")
    return 1 + jnp.sum(captured(values) < share - 1e-6, axis=-1)


class Directions(NamedTuple):
    """Singular values and singular vectors.

    values  [..., R], descending
    rows    [..., R, D], orthonormal
    """

    values: Array
    rows: Array


def top_directions(rows: Array, rank: int | None = None) -> Directions:
    """The right singular vectors of rows [..., n, D]: the directions in which they have most energy.

    Args:
        rows: e.g. shifts of tokens, or their triangular factor (`jaxsteer.theory.fits.target_factor`).
        rank: number of directions; None = all, min(n, D).

    Raises:
        ValueError: a rank below 1 or above min(n, D).
    """
    largest = min(rows.shape[-2:])
    if rank is not None and not 1 <= rank <= largest:
        raise ValueError(f"rank {rank}: rows {rows.shape[-2:]} have between 1 and {largest} directions")
    _, values, vt = jnp.linalg.svd(rows, full_matrices=False)
    return Directions(values[..., :rank], vt[..., :rank, :])


def product_directions(read: Array, write: Array) -> tuple[Directions, Directions]:
    """The singular value decomposition of the map writeᵀ · read, without forming it.

    Args:
        read: rows [..., R, in], e.g. D of steering, A of LoRA.
        write: rows [..., R, out], e.g. Uᵀ of steering, Bᵀ of LoRA.

    Returns:
        (input directions, output directions), with the same singular values.
    """
    q_read, r_read = jnp.linalg.qr(read.swapaxes(-1, -2))
    q_write, r_write = jnp.linalg.qr(write.swapaxes(-1, -2))
    core = jnp.einsum("...ir,...jr->...ij", r_write, r_read, precision=HIGHEST)
    u, values, vt = jnp.linalg.svd(core, full_matrices=False)
    inputs = jnp.einsum("...ri,...di->...rd", vt, q_read, precision=HIGHEST)
    outputs = jnp.einsum("...ir,...di->...rd", u, q_write, precision=HIGHEST)
    return Directions(values, inputs), Directions(values, outputs)


def principal_angles(one: Array, other: Array) -> Array:
    """Principal angles between two subspaces, radians, ascending: [..., R, D] and [..., S, D] -> [..., min(R, S)].

    Computed from sines where they are small and from cosines elsewhere, so that small angles keep their precision
    (Björck & Golub 1973). Rows must be linearly independent. An angle has no gradient at 0, where it is |θ|; what is
    returned there is finite.
    """
    a, b = (_orthonormal(rows) for rows in ((one, other) if one.shape[-2] >= other.shape[-2] else (other, one)))
    inner = jnp.einsum("...rd,...sd->...rs", a, b, precision=HIGHEST)
    cosines = jnp.linalg.svd(inner, compute_uv=False)
    apart = b - jnp.einsum("...rs,...rd->...sd", inner, a, precision=HIGHEST)
    sines = jnp.linalg.svd(apart, compute_uv=False)[..., ::-1]
    small = cosines**2 > 0.5
    # The branch that is not taken gets 0: its slope at 1 is infinite, and 0 · ∞ would make the gradient NaN.
    sines, cosines = jnp.where(small, sines, 0), jnp.where(small, 0, cosines)
    return jnp.where(small, jnp.arcsin(sines), jnp.arccos(cosines))


def subspace_overlap(one: Array, other: Array) -> Array:
    """Mean cos² of the principal angles, in [0, 1], [...]; `chance` is its expectation for random subspaces.

    ‖A Bᵀ‖² / min(R, S) for orthonormal rows A and B: smooth everywhere, unlike the angles. Rows must be linearly
    independent.
    """
    inner = jnp.einsum("...rd,...sd->...rs", _orthonormal(one), _orthonormal(other), precision=HIGHEST)
    return jnp.clip(jnp.sum(inner**2, axis=(-2, -1)) / min(inner.shape[-2:]), 0, 1)


def chance(one: Array, other: Array) -> float:
    """The expected overlap of random subspaces of these dimensions, max(R, S) / D."""
    return max(one.shape[-2], other.shape[-2]) / one.shape[-1]


def _orthonormal(rows: Array) -> Array:
    q, _ = jnp.linalg.qr(rows.swapaxes(-1, -2))
    return q.swapaxes(-1, -2)


def method_directions(plan: Plan, steering: Steering, side: Side) -> dict[tuple[str, str, str], Array]:
    """The directions that a plan's methods read or write, as they declare them.

    Vectors at `attn.heads` (one per head) are left out: they do not share a space.

    Args:
        plan: the plan.
        steering: its tree.
        side: "reads" or "writes".

    Returns:
        {(slot, site, parameter): rows [A, R, D]}

    Raises:
        ValueError: an unknown side.
    """
    if side not in ("reads", "writes"):
        raise ValueError(f"side must be reads or writes, got {side!r}")
    directions = {}
    for slot in plan:
        for site in slot.sites:
            for name, axis in getattr(slot.method, side) if site != "attn.heads" else ():
                part = Bundle(slot, site, name, axis)
                directions[slot.name, site, name] = part.to_rows(part.leaf(steering))
    return directions


def map_directions(plan: Plan, steering: Steering) -> dict[tuple[str, str], tuple[Directions, Directions]]:
    """Spectrum and directions of each low-rank map in a plan: U D of steering, s B A of LoRA.

    Returns:
        {(slot, site): (inputs, outputs)}, see `product_directions`, with a leading axis over the slot's layers.
    """
    maps = {}
    for slot in plan:
        for site in slot.sites:
            p = steering[slot.name][site]
            if isinstance(slot.method, LinearSteering | NonlinearSteering):
                maps[slot.name, site] = product_directions(p["D"] * slot.method.alpha, p["U"].swapaxes(-1, -2))
            elif isinstance(slot.method, LoRA):
                maps[slot.name, site] = product_directions(p["A"] * slot.method.scale, p["B"].swapaxes(-1, -2))
    return maps
