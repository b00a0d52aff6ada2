"""The steering tree of a plan: initialisation, shapes, penalties, parameter counts."""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from jaxsteer.models.config import ModelConfig, site_dims
from jaxsteer.models.quantise import dequantised
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


def count_parameters(tree: PyTree) -> int:
    """Number of scalars in a tree of arrays or shapes."""
    return sum(int(leaf.size) for leaf in jax.tree.leaves(tree))


def count_trained(plan: Plan, steering: Steering, frozen: Sequence[str] = ()) -> int:
    """Number of trained scalars in a steering tree: without constants, unselected heads (LoFiT) and frozen slots."""
    return sum(
        slot.method.count(steering[slot.name][site]) for slot in plan if slot.name not in frozen for site in slot.sites
    )
