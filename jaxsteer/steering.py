"""The steering tree of a plan: initialisation, shapes, penalties, folding into the weights, parameter counts."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike, DTypeLike

from jaxsteer.models.config import ModelConfig, site_dims
from jaxsteer.models.quantise import dequantised
from jaxsteer.models.strength import check_strength, interpolate
from jaxsteer.plans import method_name, validate_plan
from jaxsteer.types import Array, Intervention, Kind, ParamSpec, Plan, PyTree, Slot, Steering


def param_specs(plan: Plan, config: ModelConfig) -> dict[str, dict[str, dict[str, ParamSpec]]]:
    """The parameters of each slot and site for one layer, in the layout of the steering tree."""
    return {slot.name: {site: slot.method.param_specs(site_dims(config, site)) for site in slot.sites} for slot in plan}


def init_steering(
    plan: Plan, config: ModelConfig, key: Array, dtype: DTypeLike = jnp.float32, *, base: PyTree | None = None
) -> Steering:
    """Initialise the steering tree of a plan, steering[slot][site][param].

    Every leaf and layer has its own key, derived from its path, so adding a slot or leaving out a layer does not change
    the others.

    Args:
        plan: the steering plan.
        config: the model's config.
        key: PRNG key.
        dtype: of the parameters.
        base: the base tree; only needed by methods that start from the weights (PiSSA).

    Returns:
        The steering tree, each leaf [A, ...] over the slot's active layers.

    Raises:
        ValueError: the plan does not fit the model, see `validate_plan`; or a method needs `base`.
    """
    validate_plan(plan, config)
    wide = np.promote_types(dtype, np.float32)  # QR and SVD have no lower precision

    def stack(slot: Slot, path: str, spec: ParamSpec) -> Array:
        leaf_key = jax.random.fold_in(key, zlib.crc32(path.encode()))
        keys = jax.vmap(jax.random.fold_in, (None, 0))(leaf_key, jnp.array(slot.active_layers(config.layers)))
        return jax.vmap(lambda k: spec.init(k, spec.shape, wide))(keys)

    def start(slot: Slot, site: str, specs: dict[str, ParamSpec]) -> dict[str, Array]:
        params = {name: stack(slot, f"{slot.name}/{site}/{name}", spec) for name, spec in specs.items()}
        if type(slot.method).from_kernel is Intervention.from_kernel:
            return params
        if base is None:
            raise ValueError(
                f"slot {slot.name!r}: {method_name(slot.method)} starts from the weights; pass the base tree as `base`"
            )
        group, projection = site.split(".")
        weights = jax.tree.map(jnp.asarray, dict(base["blocks"][group][projection]))
        kernel_of = lambda layer: dequantised({name: leaf[layer] for name, leaf in weights.items()})["kernel"]
        # One layer at a time: an SVD of all of them at once would need many times their memory.
        return jax.lax.map(
            lambda xs: dict(slot.method.from_kernel(xs[0], kernel_of(xs[1]))),
            (params, jnp.array(slot.active_layers(config.layers))),
        )

    specs = param_specs(plan, config)
    steering = {
        slot.name: {site: start(slot, site, params) for site, params in specs[slot.name].items()} for slot in plan
    }
    return jax.tree.map(lambda leaf: leaf.astype(dtype), steering)


def steering_shapes(plan: Plan, config: ModelConfig, dtype: DTypeLike = jnp.float32) -> PyTree:
    """The steering tree of a plan as `jax.ShapeDtypeStruct`s.

    Raises:
        ValueError: the plan does not fit the model, see `validate_plan`.
    """
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


def with_leaf(steering: Steering, path: tuple[str, str, str], leaf: Array) -> Steering:
    """A copy of the tree with the leaf at (slot, site, parameter) replaced."""
    slot, site, name = path
    return steering | {slot: steering[slot] | {site: steering[slot][site] | {name: leaf}}}


def keep_kind(plan: Plan, steering: Steering, kind: Kind) -> Steering:
    """The steering with all slots of the other kind zeroed, which switches them off."""
    return {
        slot.name: steering[slot.name]
        if slot.method.kind == kind
        else jax.tree.map(jnp.zeros_like, steering[slot.name])
        for slot in plan
    }


def penalty(plan: Plan, steering: Steering, step: Array) -> Array:
    """The sum of the methods' own penalties at a step. Scalar fp32."""
    terms = [slot.method.penalty(steering[slot.name][site], step) for slot in plan for site in slot.sites]
    return sum(terms, jnp.zeros((), jnp.float32))


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


def count_parameters(tree: PyTree) -> int:
    """Number of scalars in a tree of arrays or shapes."""
    return sum(int(leaf.size) for leaf in jax.tree.leaves(tree))


def count_trained(plan: Plan, steering: Steering, frozen: Sequence[str] = ()) -> int:
    """Number of trained scalars in a steering tree: without constants, unselected heads (LoFiT) and frozen slots."""
    return sum(
        slot.method.count(steering[slot.name][site]) for slot in plan if slot.name not in frozen for site in slot.sites
    )
