"""Low-rank updates of single projections: what other programs call LoRA, and what a plan becomes there."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxsteer.folding import TAKERS, affine_parts, unfoldable
from jaxsteer.interventions import DoRA, LoRA
from jaxsteer.io.steered import SteeredModel
from jaxsteer.models.config import ModelConfig, projections_of
from jaxsteer.plans import method_name
from jaxsteer.steering import param_specs
from jaxsteer.types import Array, Factors, Plan, PyTree, Slot, Steering


class Place(NamedTuple):
    """A projection of one layer."""

    site: str
    layer: int


@dataclass(frozen=True, eq=False)
class Update:
    """The update s (B A)ᵀ of a kernel [in, out].

    a, b       A [R, in], B [out, R]
    scale      s
    magnitude  DoRA's m [out], the difference from the kernel's norms; None = plain LoRA
    """

    a: np.ndarray
    b: np.ndarray
    scale: float
    magnitude: np.ndarray | None = None

    @property
    def rank(self) -> int:
        """R."""
        return self.a.shape[0]

    def then(self, other: Update) -> Update:
        """Both updates, as one of the ranks' sum."""
        same = self.scale == other.scale
        one, two = (self.b, other.b) if same else (self.b * self.scale, other.b * other.scale)
        return Update(np.concatenate([self.a, other.a]), np.concatenate([one, two], 1), self.scale if same else 1.0)


Updates = dict[Place, Update]


def refuse_lora(plan: Plan, config: ModelConfig, *, dora: bool = True) -> list[str]:
    """Why a plan cannot be written as LoRA, a sentence for each slot, with the nearest alternative."""
    reasons = []
    for slot in plan:
        what = f"slot {slot.name!r} ({method_name(slot.method)} @ {','.join(slot.sites)})"
        if slot.method.kind == "weight":
            if slot.positions.kind != "all":
                reasons.append(f"{what}: updates positions {slot.positions}; LoRA updates all. Use jaxsteer itself")
            elif (factors := _factors_of(slot, config)) is None:
                reasons.append(f"{what}: its update is no product of two factors; merge it (--to hf)")
            elif factors.magnitude is not None and not dora:
                reasons.append(f"{what}: DoRA is not LoRA; merge it (--to hf)")
            elif factors.magnitude is not None and any(_share(slot, other) for other in plan if other is not slot):
                reasons.append(
                    f"{what}: another slot updates its projections, on which DoRA depends. Use jaxsteer itself"
                )
        elif reason := unfoldable(slot, config):
            reasons.append(f"{reason}. {_alternative(slot)}")
        elif (parts := affine_parts(slot, config)) is not None and (parts.shift is not None or parts.scale is not None):
            part = "a shift needs a bias" if parts.shift is not None else "a scale has full rank"
            reasons.append(f"{what}: {part}, which LoRA does not have; merge it (--to hf, --to gguf)")
    return reasons


def _factors_of(slot: Slot, config: ModelConfig) -> Factors | None:
    """The factors of a weight slot's update, as shapes; None if it has none."""
    site = slot.sites[0]
    specs = param_specs((slot,), config)[slot.name][site]
    shapes = {name: jax.ShapeDtypeStruct(spec.shape, jnp.float32) for name, spec in specs.items()}
    return jax.eval_shape(slot.method.factors, shapes)


def _alternative(slot: Slot) -> str:
    """What comes nearest to a slot that is no LoRA."""
    if slot.positions.kind != "all" or slot.sites != ("block",):
        return "Use jaxsteer itself, or fit a LoRA to it (jaxsteer.theory.to_lora)"
    return (
        "Serve it as it is with --to hf-steered or --to hf-steerable and --to vllm, or fit a LoRA to it with "
        "--fit-lora RANK, which says how near it comes"
    )


def _share(one: Slot, other: Slot) -> bool:
    """Whether two slots update or merge into one projection."""
    projections = lambda slot: {
        name for site in slot.sites for name in (TAKERS[site].projections if site in TAKERS else (site,))
    }
    return one.shares_layer(other) and not projections(one).isdisjoint(projections(other))


def updates_of(steered: SteeredModel) -> Updates:
    """The plan as updates of projections, exactly; `refuse_lora` says which plans have them.

    Weight slots come first, then affine ones in the order in which they act, each on the weights before it.
    """
    updates: Updates = {}
    layers = steered.loaded.config.layers
    weight = [slot for slot in steered.plan if slot.method.kind == "weight"]
    affine = [slot for slot in steered.plan if slot.method.kind != "weight"]
    for slot in weight:
        for site in slot.sites:
            params = {name: np.asarray(leaf) for name, leaf in steered.steering[slot.name][site].items()}
            for at, layer in enumerate(slot.active_layers(layers)):
                _add(updates, Place(site, layer), _update_of(slot, {name: leaf[at] for name, leaf in params.items()}))
    pairs = [(slot, site) for slot in affine for site in slot.sites]
    behind = [pair for pair in pairs if TAKERS[pair[1]].side == "output"]
    before = [pair for pair in pairs if TAKERS[pair[1]].side == "input"]
    for slot, site in [*behind, *before[::-1]]:
        _add_affine(updates, steered, slot, site)
    return updates


def _add(updates: Updates, place: Place, update: Update) -> None:
    """Add an update at a place, after those that are there."""
    updates[place] = updates[place].then(update) if place in updates else update


def _update_of(slot: Slot, p: dict[str, Array]) -> Update:
    """One layer's parameters of a weight slot as an update."""
    factors = slot.method.factors(p)
    assert factors is not None
    magnitude = None if factors.magnitude is None else np.asarray(factors.magnitude)
    return Update(np.asarray(factors.a), np.asarray(factors.b), factors.scale, magnitude)


def _add_affine(updates: Updates, steered: SteeredModel, slot: Slot, site: str) -> None:
    """Add a slot whose Δ = W D y becomes a factor pair of each projection that takes it."""
    config = steered.loaded.config
    taker = TAKERS[site]
    for at, layer in enumerate(slot.active_layers(config.layers)):
        delta = slot.method.affine({name: leaf[at] for name, leaf in steered.steering[slot.name][site].items()})
        assert delta is not None
        assert delta.read is not None
        assert delta.write is not None
        read, write = np.asarray(delta.read), np.asarray(delta.write)
        for name in taker.projections:
            if name in projections_of(config):
                kernel = kernel_at(steered.base, Place(name, layer), updates.get(Place(name, layer)))
                a, b = (read @ kernel.T, write) if taker.side == "output" else (read, kernel.T @ write)
                _add(updates, Place(name, layer), Update(a, b, 1.0))


def kernel_at(base: PyTree, place: Place, update: Update | None = None) -> np.ndarray:
    """The kernel [in, out] at a place of a base tree, and with an update, if there is one; fp32."""
    group, part = place.site.split(".")
    kernel = np.asarray(base["blocks"][group][part]["kernel"][place.layer], np.float32)
    return kernel if update is None else kernel + update.scale * (update.b @ update.a).T


def alpha_for(scale: float, rank: int) -> float:
    """The alpha whose quotient by the rank is a scale, bit for bit; where there is none, the nearest."""
    near = scale * rank
    exact = (a for a in (near, math.nextafter(near, -math.inf), math.nextafter(near, math.inf)) if a / rank == scale)
    return next(exact, near)


def plan_of(updates: Updates, config: ModelConfig) -> tuple[Plan, Steering]:
    """Updates as slots: one for each rank, scale and kind, and each set of layers, in the order of the model.

    The names are "lora", "lora_2" and so on.
    """
    where: dict[tuple, dict[str, list[int]]] = {}
    for place, update in sorted(updates.items(), key=lambda item: (item[0].layer, item[0].site)):
        kind = (update.rank, update.scale, update.magnitude is None)
        where.setdefault(kind, {}).setdefault(place.site, []).append(place.layer)
    groups: dict[tuple, list[str]] = {}
    for kind, of_site in where.items():
        for site, at in of_site.items():
            groups.setdefault((*kind, tuple(at)), []).append(site)
    slots, steering = [], {}
    for number, ((rank, scale, plain, layers), sites) in enumerate(groups.items(), 1):
        name = "lora" if number == 1 else f"lora_{number}"
        method = (LoRA if plain else DoRA)(rank=rank, alpha=alpha_for(alpha_for(scale, rank) / rank, rank))
        chosen = None if layers == tuple(range(config.layers)) else layers
        slots.append(Slot(name, method, tuple(sites), chosen))
        steering[name] = {site: _stack([updates[Place(site, layer)] for layer in layers]) for site in sites}
    return tuple(slots), steering


def _stack(updates: Sequence[Update]) -> dict[str, Array]:
    """The stacked parameters of updates of one kind."""
    params = {"A": jnp.stack([u.a for u in updates]), "B": jnp.stack([u.b for u in updates])}
    if magnitudes := [u.magnitude for u in updates if u.magnitude is not None]:
        params["m"] = jnp.stack(magnitudes)
    return params


def as_lora(steered: SteeredModel) -> SteeredModel:
    """The same model with a plan of LoRA (and DoRA) slots only, exactly."""
    plan, steering = plan_of(updates_of(steered), steered.loaded.config)
    return replace(steered, plan=plan, steering=steering)
