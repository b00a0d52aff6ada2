"""A plan as rows of a table, with its numbers of parameters."""

from __future__ import annotations

from typing import NamedTuple

from jaxsteer.plans import method_name
from jaxsteer.types import Plan, Steering


class PlanRow(NamedTuple):
    """One slot at one site, in words, with its number of trained parameters."""

    slot: str
    method: str
    site: str
    layers: str
    positions: str
    parameters: int


def plan_rows(plan: Plan, steering: Steering, layers: int) -> list[PlanRow]:
    """A row for each slot and site.

    Args:
        plan: the slots.
        steering: their tree, or its shapes.
        layers: number of layers of the model.
    """
    rows = []
    for slot in plan:
        active = slot.active_layers(layers)
        shown = f"{active[0]}-{active[-1]}" if active == tuple(range(active[0], active[-1] + 1)) else str(list(active))
        method = repr(slot.method).replace(type(slot.method).__name__, method_name(slot.method))
        for site in slot.sites:
            count = slot.method.count(steering[slot.name][site])
            rows.append(PlanRow(slot.name, method, site, shown, str(slot.positions), count))
    return rows
