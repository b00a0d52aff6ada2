"""Weights that compute what steering computes: the equivalence of updates and shifts, used exactly.

A weight method's update is added to its kernel. An activation method whose Δ is affine in y becomes a change of the
projections around its site (`TAKERS`): those whose output is y take Δ behind them, those whose input is y before them.
Where Δ is affine this holds exactly, not to first order: y + M y + v with y = Kᵀx + b is (K + K Mᵀ)ᵀ x + (b + M b + v).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from jaxsteer.models.config import ModelConfig, projections_of
from jaxsteer.models.quantise import dequantised
from jaxsteer.models.strength import check_strength, interpolate
from jaxsteer.plans import method_name
from jaxsteer.steering import param_specs
from jaxsteer.types import Affine, Array, Intervention, Plan, PyTree, Slot, Steering


@dataclass(frozen=True)
class Taker:
    """The projections into which an affine Δ at a site is merged.

    projections  each of them takes Δ
    side         whether the site is their output or their input
    constant     whether only a shift can be merged: the residual stream passes a block's projections by
    normed       whether Δ would have to pass the norm of sublayer outputs that some families have
    """

    projections: tuple[str, ...]
    side: Literal["output", "input"]
    constant: bool = False
    normed: bool = False


TAKERS: dict[str, Taker] = {
    "mlp": Taker(("mlp.down",), "output", normed=True),
    "attn": Taker(("attn.o",), "output", normed=True),
    "mlp.in": Taker(("mlp.gate", "mlp.up"), "input"),
    "attn.heads": Taker(("attn.o",), "input"),
    "block": Taker(("mlp.down",), "output", constant=True, normed=True),
}
"""Which projection takes an affine Δ, by site."""


class Folded(NamedTuple):
    """A model with steering merged in.

    config    with the biases that were needed
    base      the merged base tree
    plan      the slots that are left
    steering  theirs
    """

    config: ModelConfig
    base: PyTree
    plan: Plan
    steering: Steering


def affine_parts(slot: Slot, config: ModelConfig) -> Affine | None:
    """Which parts an activation slot's Δ has, the same at all of its sites, as shapes; None if it is not affine."""
    site = slot.sites[0]
    shapes = {
        name: jax.ShapeDtypeStruct(spec.shape, jnp.float32)
        for name, spec in param_specs((slot,), config)[slot.name][site].items()
    }
    return jax.eval_shape(slot.method.affine, shapes)


def unfoldable(slot: Slot, config: ModelConfig) -> str | None:
    """Why no weights of this model can compute what a slot computes, in words; None if they can."""
    what = f"slot {slot.name!r} ({method_name(slot.method)} @ {','.join(slot.sites)})"
    if slot.positions.kind != "all":
        return f"{what}: steers positions {slot.positions}; weights act on all tokens alike"
    if slot.method.kind == "weight":
        return None
    parts = affine_parts(slot, config)
    if parts is None:
        return f"{what}: its shift is not affine in the activation, so that no weights compute it"
    for site in slot.sites:
        taker = TAKERS[site]
        if taker.constant and (parts.read is not None or parts.scale is not None):
            return f"{what}: the residual stream passes every projection by, so that only a fixed vector can be merged"
        if taker.normed and config.post_norm:
            return f"{what}: in this family a norm lies between {taker.projections[0]} and the site"
    return None


def biases_needed(plan: Plan, config: ModelConfig) -> dict[str, str]:
    """The projections that need a bias, with the slot that needs it, if every affine slot is merged."""
    needed: dict[str, str] = {}
    for slot in plan:
        parts = affine_parts(slot, config) if slot.method.kind == "activation" else None
        if parts is not None and parts.shift is not None:
            takers = [name for site in slot.sites for name in TAKERS[site].projections]
            needed |= {name: slot.name for name in takers if name in projections_of(config)}
    return needed


def fold_weights(
    plan: Plan, base: PyTree, steering: Steering, *, strength: Mapping[str, ArrayLike] | None = None
) -> tuple[PyTree, Plan, Steering]:
    """Merge every slot that can be merged into the base weights, so that inference pays nothing for it.

    A method that depends on the kernel (DoRA) is merged only if no other slot shares a projection with it, since
    merging either one would change what the other depends on.

    Args:
        plan: the steering plan.
        base: the base tree.
        steering: the steering tree of the plan.
        strength: a factor [] of each slot's shift, as in `forward`; the slots that are left keep theirs.

    Returns:
        The merged base tree, and the plan and the steering of the slots that are left.

    Raises:
        ValueError: a strength of a slot that the plan does not have, or one that is not a scalar.
    """
    factors = check_strength(plan, strength)
    blocks, rest = base["blocks"], []
    for slot in plan:
        factor = factors.get(slot.name)
        merged = None if _depends_on_neighbour(slot, plan) else _fold_slot(slot, blocks, steering[slot.name], factor)
        if merged is None:
            rest.append(slot)
        else:
            blocks = merged
    return base | {"blocks": blocks}, tuple(rest), {slot.name: steering[slot.name] for slot in rest}


def _depends_on_neighbour(slot: Slot, plan: Plan) -> bool:
    """Whether merging a slot would change another one's kernel, or the reverse, where one of them depends on it."""
    depends = lambda method: getattr(method, "depends_on_kernel", False)
    return any(
        other.name != slot.name
        and (depends(slot.method) or depends(other.method))
        and not set(slot.sites).isdisjoint(other.sites)
        and slot.shares_layer(other)
        for other in plan
    )


def _fold_slot(
    slot: Slot, blocks: PyTree, params: dict[str, dict[str, Array]], strength: Array | None = None
) -> PyTree | None:
    """The blocks with a slot merged in, at a strength; None if it cannot be merged."""
    fold = slot.method.fold if strength is None else _fold_at(slot.method, strength)
    if slot.method.kind != "weight" or slot.positions.kind != "all":
        return None
    for site in slot.sites:
        group, name = site.split(".")
        weights = jax.tree.map(jnp.asarray, dict(dequantised(blocks[group][name])))
        active = jnp.array(slot.active_layers(weights["kernel"].shape[0]))
        kernel, bias = weights["kernel"][active], weights["bias"][active] if "bias" in weights else None
        folded = jax.vmap(fold)(params[site], kernel, bias)
        if folded is None:
            return None
        for leaf, new in zip(("kernel", "bias"), folded, strict=True):
            if new is not None:
                old = weights.get(leaf, jnp.zeros((blocks[group][name]["kernel"].shape[0], *new.shape[1:]), new.dtype))
                weights[leaf] = old.at[active].set(new)
        blocks = blocks | {group: blocks[group] | {name: weights}}
    return blocks


def _fold_at(method: Intervention, strength: Array) -> Callable:
    """A method's `fold` at a strength: kernel + s · (folded − kernel), rounded once, and the same for the bias."""

    def fold(p: Mapping[str, Array], kernel: Array, bias: Array | None) -> tuple[Array, Array | None] | None:
        wide = np.promote_types(kernel.dtype, np.float32)
        folded = method.fold(p, kernel.astype(wide), None if bias is None else bias.astype(wide))
        if folded is None:
            return None
        mix = lambda old, new: interpolate(old.astype(wide), new.astype(wide), strength.astype(wide))
        new_kernel, new_bias = mix(kernel, folded[0]).astype(kernel.dtype), folded[1]
        if new_bias is None:
            return new_kernel, None
        old_bias = jnp.zeros_like(new_bias) if bias is None else bias
        return new_kernel, mix(old_bias, new_bias).astype(kernel.dtype if bias is None else bias.dtype)

    return fold


def fold_all(config: ModelConfig, plan: Plan, base: PyTree, steering: Steering) -> Folded:
    """Merge every slot that can be merged, weight updates first and then affine steering; see `unfoldable`.

    An affine slot stays if an earlier or later slot that cannot be merged shares its site: the order matters there.

    Args:
        config: the model's config.
        plan: the steering plan.
        base: the base tree, in float.
        steering: the steering tree of the plan.
    """
    base, rest, left = fold_weights(plan, base, steering)
    stuck = [slot for slot in rest if unfoldable(slot, config) or slot.method.kind == "weight"]
    movable = [slot for slot in rest if slot not in stuck and not any(_meet(slot, other) for other in stuck)]
    if needed := biases_needed(tuple(movable), config):
        attn = config.attn_bias or any(name.startswith("attn.") for name in needed)
        mlp = config.mlp_bias or any(name.startswith("mlp.") for name in needed)
        config = replace(config, attn_bias=attn, mlp_bias=mlp)
        base = _with_biases(config, base)
    for slot, site in _in_order(movable):
        base = _fold_affine(slot, site, config, base, left[slot.name][site])
    remaining = tuple(slot for slot in rest if slot not in movable)
    return Folded(config, base, remaining, {slot.name: left[slot.name] for slot in remaining})


def _meet(one: Slot, other: Slot) -> bool:
    """Whether `other` acts between the projections that take `one` and its sites, or depends on these projections."""
    between = {name for site in one.sites for name in (site, *TAKERS[site].projections)}
    if "block" in one.sites:
        between.add("mlp")
    return one.shares_layer(other) and not between.isdisjoint(other.sites)


def _in_order(slots: list[Slot]) -> list[tuple[Slot, str]]:
    """Slots and sites in the order of merging: behind a projection as they act, before one the last first."""
    pairs = [(slot, site) for slot in slots for site in slot.sites]
    outputs = [(slot, site) for slot, site in pairs if TAKERS[site].side == "output"]
    inputs = [(slot, site) for slot, site in pairs if TAKERS[site].side == "input"]
    # Both mlp and block are merged behind mlp.down, where block acts last.
    return sorted(outputs, key=lambda pair: pair[1] == "block") + inputs[::-1]


def _with_biases(config: ModelConfig, base: PyTree) -> PyTree:
    """The base tree with a zero bias for each projection that the config gives one and the tree does not."""
    blocks = base["blocks"]
    for name in projections_of(config):
        group, part = name.split(".")
        weights = blocks[group][part]
        if getattr(config, f"{group}_bias") and "bias" not in weights:
            kernel = weights["kernel"]
            zero = jnp.zeros((kernel.shape[0], kernel.shape[-1]), kernel.dtype)
            blocks = blocks | {group: blocks[group] | {part: weights | {"bias": zero}}}
    return base | {"blocks": blocks}


def _fold_affine(slot: Slot, site: str, config: ModelConfig, base: PyTree, params: Mapping[str, Array]) -> PyTree:
    """The base tree with an affine slot at one site merged in, computed in fp32 and rounded once."""
    taker, blocks = TAKERS[site], base["blocks"]
    active = jnp.array(slot.active_layers(config.layers))
    for name in taker.projections:
        if name not in projections_of(config):
            continue
        group, part = name.split(".")
        weights = dict(blocks[group][part])
        merge = merge_behind if taker.side == "output" else merge_before
        chosen = {leaf: jnp.asarray(value)[active] for leaf, value in weights.items()}
        merged = jax.vmap(lambda p, w, merge=merge: merge(slot.method.affine(p), w))(params, chosen)
        weights = {leaf: jnp.asarray(value).at[active].set(merged[leaf]) for leaf, value in weights.items()}
        blocks = blocks | {group: blocks[group] | {part: weights}}
    return base | {"blocks": blocks}


def merge_behind(delta: Affine, weights: Mapping[str, Array]) -> dict[str, Array]:
    """One layer's kernel [in, out] and bias that compute y + Δ(y) where they computed y."""
    wide = {name: leaf.astype(jnp.promote_types(leaf.dtype, jnp.float32)) for name, leaf in weights.items()}
    if delta.read is not None:
        change = lambda y: jnp.einsum("...d,rd,er->...e", y, delta.read, delta.write)
        wide = {name: leaf + change(leaf) for name, leaf in wide.items()}
    if delta.shift is not None:
        wide["bias"] = wide["bias"] + delta.shift
    return {name: leaf.astype(weights[name].dtype) for name, leaf in wide.items()}


def merge_before(delta: Affine, weights: Mapping[str, Array]) -> dict[str, Array]:
    """One layer's kernel [in, out] and bias that compute from z what they computed from z + Δ(z)."""
    wide = {name: leaf.astype(jnp.promote_types(leaf.dtype, jnp.float32)) for name, leaf in weights.items()}
    kernel = wide["kernel"]
    if delta.shift is not None:
        wide["bias"] = wide["bias"] + delta.shift.reshape(-1) @ kernel
    if delta.scale is not None:
        wide["kernel"] = kernel + delta.scale.reshape(-1)[:, None] * kernel
    if delta.read is not None:
        assert delta.write is not None
        wide["kernel"] = wide["kernel"] + jnp.einsum("rd,er,ef->df", delta.read, delta.write, kernel)
    return {name: leaf.astype(weights[name].dtype) for name, leaf in wide.items()}
