"""Spectra of shifts and updates, and angles between the subspaces that they live in.

Subspaces are bundles of directions, rows [..., R, D]; leading axes (layers) go along.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

from jaxsteer.interventions import LinearSteering, LoRA, NonlinearSteering
from jaxsteer.orthogonality import HIGHEST, Bundle
from jaxsteer.types import Array, Plan, Steering

Side = Literal["reads", "writes"]


def effective_rank(values: Array) -> Array:
    """exp(−Σ p log p) with p = σ² / Σσ², the number of directions that the energy is spread over: [..., R] -> [...].

    1 where one direction has all the energy, R where all have the same (Roy & Vetterli 2007, with energies); 0 for
    nothing.
    """
    energy = values**2
    whole = jnp.sum(energy, axis=-1, keepdims=True)
    share = energy / jnp.where(whole > 0, whole, 1)
    entropy = -jnp.sum(jax.scipy.special.xlogy(share, share), axis=-1)
    return jnp.where(whole[..., 0] > 0, jnp.exp(entropy), 0)


def captured(values: Array) -> Array:
    """The share of the energy in the first 1, 2, ... of descending singular values: [..., R] -> [..., R]."""
    energy = jnp.cumsum(values**2, axis=-1)
    return energy / jnp.maximum(energy[..., -1:], jnp.finfo(energy.dtype).tiny)


def directions_for(values: Array, share: float = 0.9) -> Array:
    """How many directions hold this share of the energy: [..., R] -> int [...].

    Raises:
        ValueError: a share that is not above 0 and at most 1.
    """
    if not 0 < share <= 1:
        raise ValueError(f"a share of the energy is above 0 and at most 1, got {share}")
    return 1 + jnp.sum(captured(values) < share - 1e-6, axis=-1)


class Directions(NamedTuple):
    """Singular values [..., R], descending, and the directions that belong to them, orthonormal rows [..., R, D]."""

    values: Array
    rows: Array


def top_directions(rows: Array, rank: int | None = None) -> Directions:
    """The right singular vectors of rows [..., n, D]: the directions in which they have most energy.

    Args:
        rows: e.g. shifts of tokens, or the triangle that stands for them (`jaxsteer.theory.fits.target_factor`).
        rank: how many; None = all, min(n, D).

    Raises:
        ValueError: a rank above that.
    """
    most = min(rows.shape[-2:])
    if rank is not None and not 1 <= rank <= most:
        raise ValueError(f"rank {rank}: rows {rows.shape[-2:]} have between 1 and {most} directions")
    _, values, vt = jnp.linalg.svd(rows, full_matrices=False)
    return Directions(values[..., :rank], vt[..., :rank, :])


def product_directions(read: Array, write: Array) -> tuple[Directions, Directions]:
    """Singular values of the map writeᵀ · read, with its (input, output) directions; nothing of [out, in] is formed.

    Args:
        read: rows [..., R, in]. write: rows [..., R, out], e.g. D and Uᵀ of steering, A and Bᵀ of LoRA.
    """
    q_read, r_read = jnp.linalg.qr(read.swapaxes(-1, -2))
    q_write, r_write = jnp.linalg.qr(write.swapaxes(-1, -2))
    core = jnp.einsum("...ir,...jr->...ij", r_write, r_read, precision=HIGHEST)
    u, values, vt = jnp.linalg.svd(core, full_matrices=False)
    inputs = jnp.einsum("...ri,...di->...rd", vt, q_read, precision=HIGHEST)
    outputs = jnp.einsum("...ir,...di->...rd", u, q_write, precision=HIGHEST)
    return Directions(values, inputs), Directions(values, outputs)


def principal_angles(one: Array, other: Array) -> Array:
    """Angles between two spans, rows [..., R, D] and [..., S, D] -> [..., min(R, S)], radians, ascending.

    From cosines where they are far from 1 and from sines where not, so that small angles keep their digits (Björck &
    Golub 1973). Rows must be linearly independent.
    """
    a, b = (_orthonormal(rows) for rows in ((one, other) if one.shape[-2] >= other.shape[-2] else (other, one)))
    inner = jnp.einsum("...rd,...sd->...rs", a, b, precision=HIGHEST)
    cosines = jnp.linalg.svd(inner, compute_uv=False)
    apart = b - jnp.einsum("...rs,...rd->...sd", inner, a, precision=HIGHEST)
    sines = jnp.linalg.svd(apart, compute_uv=False)[..., ::-1]
    small = cosines**2 > 0.5
    return jnp.where(small, jnp.arcsin(jnp.clip(sines, 0, 1)), jnp.arccos(jnp.clip(cosines, 0, 1)))


def subspace_overlap(one: Array, other: Array) -> Array:
    """Mean cos² of the principal angles, in [0, 1]; `chance` is what random spans have: [...]."""
    return jnp.mean(jnp.cos(principal_angles(one, other)) ** 2, axis=-1)


def chance(one: Array, other: Array) -> float:
    """The expected overlap of random spans of these sizes, max(R, S) / D."""
    return max(one.shape[-2], other.shape[-2]) / one.shape[-1]


def _orthonormal(rows: Array) -> Array:
    q, _ = jnp.linalg.qr(rows.swapaxes(-1, -2))
    return q.swapaxes(-1, -2)


def method_directions(plan: Plan, steering: Steering, side: Side) -> dict[tuple[str, str, str], Array]:
    """The directions that a plan's methods say they read or write: (slot, site, parameter) -> rows [A, R, D].

    Vectors of methods at `attn.heads` (one a head) are left out: they live in no one space.

    Raises:
        ValueError: an unknown side.
    """
    if side not in ("reads", "writes"):
        raise ValueError(f"which directions? reads or writes, got {side!r}")
    found = {}
    for slot in plan:
        for site in slot.sites:
            for name, axis in getattr(slot.method, side) if site != "attn.heads" else ():
                part = Bundle(slot, site, name, axis)
                found[slot.name, site, name] = part.to_rows(part.leaf(steering))
    return found


def map_directions(plan: Plan, steering: Steering) -> dict[tuple[str, str], tuple[Directions, Directions]]:
    """Spectrum and directions of each low-rank map in a plan, by (slot, site): of steering's U D and of LoRA's s B A.

    Returns:
        (inputs, outputs), see `product_directions`, with a leading axis of the slot's layers.
    """
    found = {}
    for slot in plan:
        for site in slot.sites:
            p = steering[slot.name][site]
            if isinstance(slot.method, LinearSteering | NonlinearSteering):
                found[slot.name, site] = product_directions(p["D"] * slot.method.alpha, p["U"].swapaxes(-1, -2))
            elif isinstance(slot.method, LoRA):
                found[slot.name, site] = product_directions(p["A"] * slot.method.scale, p["B"].swapaxes(-1, -2))
    return found
