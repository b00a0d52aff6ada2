"""What is steered where: how large each slot's update is at each site and layer, from the steering file alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

import jax
import numpy as np

from jaxsteer.interventions import LinearSteering, NonlinearSteering
from jaxsteer.io import SteeringFile
from jaxsteer.types import Array, Intervention


@dataclass(frozen=True)
class UpdateRow:
    """One part of a slot's update at one site.

    slot, site  where
    what        is measured
    norms       by layer; None where the slot is not active
    top         the largest norm of this part at all of the slot's sites
    """

    slot: str
    site: str
    what: str
    norms: list[float | None]
    top: float

    @property
    def largest(self) -> tuple[int, float]:
        """The layer with the largest norm, and that norm."""
        return max(((n, norm) for n, norm in enumerate(self.norms) if norm is not None), key=lambda pair: pair[1])


class Part(NamedTuple):
    """A part of an update, and its norm at each active layer, [A]."""

    what: str
    norms: np.ndarray


def update_rows(file: SteeringFile) -> list[UpdateRow]:
    """A row for each slot, site and part of the update, in the plan's order."""
    rows = []
    for slot in file.plan:
        parts = {site: parts_of(slot.method, file.steering[slot.name][site]) for site in slot.sites}
        tops: dict[str, float] = {}
        for what, norms in (part for found in parts.values() for part in found):
            tops[what] = max(tops.get(what, 0.0), float(norms.max()))
        active = slot.active_layers(file.config.layers)
        for site, found in parts.items():
            for what, norms in found:
                by_layer = dict(zip(active, norms.tolist(), strict=True))
                shown = [by_layer.get(layer) for layer in range(file.config.layers)]
                rows.append(UpdateRow(slot.name, site, what, shown, tops[what]))
    return rows


def parts_of(method: Intervention, params: Mapping[str, Array]) -> list[Part]:
    """The norms of a method's update with the stacked parameters of one site; [] if its update is neither a product nor
    affine."""
    if method.kind == "weight":
        return _of_factors(method, params)
    method, left_out = _without_activation(method)
    affine = jax.vmap(lambda p: method.affine(p) or ())(dict(params))
    if not affine:
        return []
    found = []
    if affine.read is not None and affine.write is not None:
        what = "‖linear part‖, as if without its activation" if left_out else "‖linear part‖"
        found.append(Part(what, norm_of_product(affine.write, affine.read)))
    if affine.scale is not None:
        found.append(Part("‖scale‖", _norm(affine.scale)))
    if affine.shift is not None:
        found.append(Part("‖shift‖", _norm(affine.shift)))
    return found


def _of_factors(method: Intervention, params: Mapping[str, Array]) -> list[Part]:
    scale = 1.0

    def factors(p: Mapping[str, Array]) -> tuple[Array, ...]:
        nonlocal scale
        found = method.factors(p)
        if found is None:
            return ()
        scale = found.scale
        return (found.b, found.a) if found.magnitude is None else (found.b, found.a, found.magnitude)

    stacked = jax.vmap(factors)(dict(params))
    if not stacked:
        return []
    found = [Part("‖s B A‖", abs(scale) * norm_of_product(stacked[0], stacked[1]))]
    return found + [Part("‖m‖, change of the magnitudes", _norm(each)) for each in stacked[2:]]


def _without_activation(method: Intervention) -> tuple[Intervention, bool]:
    """The method with the identity in place of its activation, and whether it had one."""
    if isinstance(method, NonlinearSteering):
        return LinearSteering(method.rank, method.alpha), True
    if getattr(method, "activation", "none") != "none":
        return replace(method, activation="none"), True  # type: ignore[type-var]  # methods are dataclasses
    return method, False


def norm_of_product(left: Array, right: Array) -> np.ndarray:
    """‖L R‖ (Frobenius) of each layer, without the product itself: ‖L R‖² = Σ (LᵀL) ⊙ (R Rᵀ).

    Args:
        left: [A, D, R].
        right: [A, R, E].
    """
    left, right = np.asarray(left, np.float64), np.asarray(right, np.float64)
    grams = np.einsum("adr,ads->ars", left, left) * np.einsum("are,ase->ars", right, right)
    return np.sqrt(np.maximum(grams.sum(axis=(1, 2)), 0.0))


def _norm(values: Array) -> np.ndarray:
    """‖·‖ of each layer's values [A, ...]."""
    flat = np.asarray(values, np.float64)
    return np.sqrt((flat**2).reshape(len(flat), -1).sum(axis=1))
