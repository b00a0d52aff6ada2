"""What is steered where: how large each slot's update is at each site and layer, from the steering file alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

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
    parts: dict[str, list[float]] = {}
    for p in _by_layer(params):
        if (each := method.affine(p)) is None:
            return []
        if each.read is not None and each.write is not None:
            what = "‖linear part‖, activation left out" if left_out else "‖linear part‖"
            parts.setdefault(what, []).append(norm_of_product(each.write, each.read))
        if each.scale is not None:
            parts.setdefault("‖scale‖", []).append(_norm(each.scale))
        if each.shift is not None:
            parts.setdefault("‖shift‖", []).append(_norm(each.shift))
    return [Part(what, np.array(norms)) for what, norms in parts.items()]


def _of_factors(method: Intervention, params: Mapping[str, Array]) -> list[Part]:
    factors = [found for p in _by_layer(params) if (found := method.factors(p)) is not None]
    if not factors:
        return []
    norms = [abs(each.scale) * norm_of_product(each.b, each.a) for each in factors]
    magnitudes = [_norm(each.magnitude) for each in factors if each.magnitude is not None]
    changed = [Part("‖m‖, change of the magnitudes", np.array(magnitudes))] if magnitudes else []
    return [Part("‖s B A‖", np.array(norms)), *changed]


def _by_layer(params: Mapping[str, Array]) -> list[dict[str, Any]]:
    """The parameters of each layer, as host arrays: there is nothing to compile."""
    stacked = {name: np.asarray(leaf, np.float32) for name, leaf in params.items()}
    return [{name: leaf[n] for name, leaf in stacked.items()} for n in range(len(next(iter(stacked.values()))))]


def _without_activation(method: Intervention) -> tuple[Intervention, bool]:
    """The method with the identity in place of its activation, and whether it had one."""
    if isinstance(method, NonlinearSteering):
        return LinearSteering(method.rank, method.alpha), True
    if getattr(method, "activation", "none") != "none":
        return replace(method, activation="none"), True  # type: ignore[type-var]  # methods are dataclasses
    return method, False


def norm_of_product(left: Array, right: Array) -> float:
    """‖L R‖ (Frobenius) without the product itself: ‖L R‖² = Σ (LᵀL) ⊙ (R Rᵀ).

    Args:
        left: [D, R].
        right: [R, E].
    """
    wide, tall = np.asarray(left, np.float64), np.asarray(right, np.float64)
    return float(np.sqrt(max(0.0, np.sum((wide.T @ wide) * (tall @ tall.T)))))


def _norm(values: Array) -> float:
    return float(np.linalg.norm(np.asarray(values, np.float64)))
