"""The steering pytree of a plan: validation, initialisation, labels, counts, penalties, folding, and plans as JSON."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxsteer.models.config import ModelConfig, site_dims
from jaxsteer.models.quantise import dequantised
from jaxsteer.plans import method_name, validate_plan
from jaxsteer.types import Array, Intervention, Kind, ParamSpec, Plan, PyTree, Slot, Steering


def param_specs(plan: Plan, config: ModelConfig) -> dict[str, dict[str, dict[str, ParamSpec]]]:
    """The parameters of each slot and site for one layer, in the layout of the steering pytree."""
    return {slot.name: {site: slot.method.param_specs(site_dims(config, site)) for site in slot.sites} for slot in plan}


def init_steering(
    plan: Plan, config: ModelConfig, key: Array, dtype: Any = jnp.float32, *, base: PyTree | None = None
) -> Steering:
    """Draw the steering pytree of a plan, steering[slot][site][param], each leaf [A, ...] over the slot's layers.

    Every leaf and layer has a key of its own, derived from its path, so that adding a slot or leaving out a layer
    changes nothing elsewhere.

    Args:
        base: the base tree; only methods that start from the weights need it (PiSSA).

    Raises:
        ValueError: the plan does not fit the model, see `validate_plan`; a method needs the base and there is none.
    """
    validate_plan(plan, config)
    wide = np.promote_types(dtype, np.float32)  # QR and singular value decompositions know no lower precision

    def stack(slot: Slot, path: str, spec: ParamSpec) -> Array:
        own = jax.random.fold_in(key, zlib.crc32(path.encode()))
        keys = jax.vmap(jax.random.fold_in, (None, 0))(own, jnp.array(slot.active_layers(config.layers)))
        return jax.vmap(lambda k: spec.init(k, spec.shape, wide))(keys)

    def start(slot: Slot, site: str, specs: dict[str, ParamSpec]) -> dict[str, Array]:
        drawn = {name: stack(slot, f"{slot.name}/{site}/{name}", spec) for name, spec in specs.items()}
        if type(slot.method).from_kernel is Intervention.from_kernel:
            return drawn
        if base is None:
            raise ValueError(f"slot {slot.name!r}: {method_name(slot.method)} starts from the weights; give `base`")
        group, projection = site.split(".")
        weights = jax.tree.map(jnp.asarray, dict(base["blocks"][group][projection]))
        of = lambda layer: dequantised({name: leaf[layer] for name, leaf in weights.items()})["kernel"]
        # One layer after another: a singular value decomposition of all at once would need many times their memory.
        return jax.lax.map(
            lambda one: dict(slot.method.from_kernel(one[0], of(one[1]))),
            (drawn, jnp.array(slot.active_layers(config.layers))),
        )

    specs = param_specs(plan, config)
    drawn = {slot.name: {site: start(slot, site, params) for site, params in specs[slot.name].items()} for slot in plan}
    return jax.tree.map(lambda leaf: leaf.astype(dtype), drawn)


def steering_shapes(plan: Plan, config: ModelConfig, dtype: Any = jnp.float32) -> Any:
    """The steering pytree of a plan as `jax.ShapeDtypeStruct`s."""
    validate_plan(plan, config)
    return {
        slot.name: {
            site: {
                name: jax.ShapeDtypeStruct((len(slot.active_layers(config.layers)), *spec.shape), dtype)
                for name, spec in params.items()
            }
            for site, params in param_specs(plan, config)[slot.name].items()
        }
        for slot in plan
    }


def with_leaf(steering: Steering, place: tuple[str, str, str], leaf: Any) -> Steering:
    """The tree with another leaf at (slot, site, parameter)."""
    slot, site, name = place
    return steering | {slot: steering[slot] | {site: steering[slot][site] | {name: leaf}}}


def keep_kind(plan: Plan, steering: Steering, kind: Kind) -> Steering:
    """The steering with the slots of the other kind switched off: zeros are the identity."""
    return {
        slot.name: steering[slot.name]
        if slot.method.kind == kind
        else jax.tree.map(jnp.zeros_like, steering[slot.name])
        for slot in plan
    }


def penalty(plan: Plan, steering: Steering, step: Array) -> Array:
    """The sum of all methods' own loss terms at this step. Scalar fp32."""
    terms = [slot.method.penalty(steering[slot.name][site], step) for slot in plan for site in slot.sites]
    return sum(terms, jnp.zeros((), jnp.float32))


def fold_weights(plan: Plan, base: PyTree, steering: Steering) -> tuple[PyTree, Plan, Steering]:
    """Merge into the base weights every slot that can be; a serving model then pays nothing for them.

    A method that looks at the kernel (DoRA) is merged where no other slot meets it: each would change what the other
    starts from.

    Returns:
        The merged base tree, and the plan and steering of the slots that cannot be merged (they go on as they are).
    """
    blocks, rest = base["blocks"], []
    for slot in plan:
        merged = None if _looks_at_a_neighbour(slot, plan) else _fold_slot(slot, blocks, steering[slot.name])
        if merged is None:
            rest.append(slot)
        else:
            blocks = merged
    return base | {"blocks": blocks}, tuple(rest), {slot.name: steering[slot.name] for slot in rest}


def _looks_at_a_neighbour(slot: Slot, plan: Plan) -> bool:
    looks = lambda method: getattr(method, "looks_at_kernel", False)
    meet = lambda a, b: a is None or b is None or not set(a).isdisjoint(b)
    return any(
        other.name != slot.name
        and (looks(slot.method) or looks(other.method))
        and not set(slot.sites).isdisjoint(other.sites)
        and meet(slot.layers, other.layers)
        for other in plan
    )


def _fold_slot(slot: Slot, blocks: PyTree, params: dict) -> PyTree | None:
    if slot.method.kind != "weight" or slot.positions.kind != "all":
        return None
    for site in slot.sites:
        group, name = site.split(".")
        weights = jax.tree.map(jnp.asarray, dict(dequantised(blocks[group][name])))
        active = jnp.array(slot.active_layers(weights["kernel"].shape[0]))
        kernel, bias = weights["kernel"][active], weights["bias"][active] if "bias" in weights else None
        folded = jax.vmap(slot.method.fold)(params[site], kernel, bias)
        if folded is None:
            return None
        for leaf, new in zip(("kernel", "bias"), folded, strict=True):
            if new is not None:
                old = weights.get(leaf, jnp.zeros((blocks[group][name]["kernel"].shape[0], *new.shape[1:]), new.dtype))
                weights[leaf] = old.at[active].set(new)
        blocks = blocks | {group: blocks[group] | {name: weights}}
    return blocks


def count_parameters(tree: PyTree) -> int:
    """Number of scalars in a tree of arrays (or of shapes)."""
    return sum(int(leaf.size) for leaf in jax.tree.leaves(tree))


def count_trained(plan: Plan, steering: Steering, frozen: Sequence[str] = ()) -> int:
    """Number of scalars that train in a steering pytree: without constants, heads not selected, frozen slots."""
    return sum(
        slot.method.count(steering[slot.name][site]) for slot in plan if slot.name not in frozen for site in slot.sites
    )
