"""Adapters stacked into one steering tree, so that each token of a batch can have its own.

Plans are unified first: slots of one method and the same positions become one slot, at all their sites and layers and
at the largest rank. Whatever an adapter does not have is zero there, which is the identity of every method.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from jaxsteer.models.config import ModelConfig
from jaxsteer.plans import format_plan, validate_plan
from jaxsteer.steering import param_specs, steering_shapes
from jaxsteer.types import SITES, Array, ParamSpec, Plan, PyTree, Slot, Steering

BASE = -1
"""The index of the unsteered model."""

_versions = itertools.count()


@dataclass(frozen=True, eq=False)
class Adapters:
    """Adapters in E places of one steering tree.

    config    the model's config
    plan      the common plan; `Model(config, plan)` runs them
    steering  the stacked tree: each leaf of an ordinary one with an axis of E adapters more, before the rank or, in
              parameters without a rank, behind the layers
    names     of the adapter in each place, None where it is free
    versions  of what is in each place: a number that nothing else in this process has
    """

    config: ModelConfig
    plan: Plan
    steering: Steering
    names: tuple[str | None, ...]
    versions: tuple[int, ...]

    def index(self, adapter: str | int | None) -> int:
        """The place of an adapter, by its name or number; -1 for None, the unsteered model.

        Raises:
            ValueError: there is no such adapter.
        """
        if adapter is None:
            return BASE
        known = [name for name in self.names if name is not None]
        if isinstance(adapter, str) and adapter in known:
            return self.names.index(adapter)
        if isinstance(adapter, int) and 0 <= adapter < len(self.names) and self.names[adapter] is not None:
            return adapter
        raise ValueError(f"no adapter {adapter!r}; there are {', '.join(known) or 'none'}")

    def put(self, name: str, plan: Plan, steering: Steering) -> Adapters:
        """The adapters with one more in the first free place, or with a new one in the place of its name.

        Shapes stay, so that nothing that runs them is compiled again.

        Raises:
            ValueError: no place is free, the common plan cannot hold the adapter's, or its steering is not that of its
                plan or is not finite.
        """
        if name not in self.names and None not in self.names:
            raise ValueError(f"adapter {name!r}: all {len(self.names)} places are taken; remove one or stack more")
        place = self.names.index(name if name in self.names else None)
        return self._with(place, name, _fitted(name, self.plan, self.config, plan, steering))

    def without(self, name: str) -> Adapters:
        """The adapters without one, whose place is free again.

        Raises:
            ValueError: there is no such adapter.
        """
        return self._with(self.index(name), None, _zeros(steering_shapes(self.plan, self.config)))

    def _with(self, place: int, name: str | None, steering: PyTree) -> Adapters:
        put = lambda values, value: (*values[:place], value, *values[place + 1 :])
        leaves, tree = jax.tree.flatten(self.steering)
        new = [leaf.astype(old.dtype) for leaf, old in zip(jax.tree.leaves(steering), leaves, strict=True)]
        axes = tuple(jax.tree.leaves(adapter_axes(self.plan, self.config)))
        written = _written(leaves, new, np.int32(place), axes=axes)
        steering = jax.tree.unflatten(tree, written)
        return replace(
            self, steering=steering, names=put(self.names, name), versions=put(self.versions, next(_versions))
        )

    def alone(self, adapter: str | int) -> Steering:
        """The steering of one adapter, as an ordinary tree of the common plan."""
        place, axes = self.index(adapter), adapter_axes(self.plan, self.config)
        return jax.tree.map(lambda leaf, axis: jnp.take(leaf, place, axis=axis), self.steering, axes)

    def slot_names(self, plan: Plan) -> dict[str, str]:
        """The common plan's slot for each slot of an adapter's plan, by name: strengths are given for the former.

        Raises:
            ValueError: the common plan cannot hold this one.
        """
        held = _held(self.plan, plan, self.config)
        return {slot.name: self.plan[at].name for slot, at in zip(plan, held, strict=True)}


def stack_adapters(
    adapters: Mapping[str, tuple[Plan, Steering]],
    config: ModelConfig,
    *,
    places: int | None = None,
    dtype: DTypeLike = jnp.float32,
) -> Adapters:
    """Stack adapters, so that each token of a batch can have its own: `forward(..., adapters=index)`.

    Slots of one method at the same positions share a slot of the common plan, and may differ in rank, scale, sites,
    layers and settings of training; other slots get one of their own. Ranks are padded with zeros. Scales that differ
    become factors of parameters, which may round them.

    Args:
        adapters: plan and steering tree of each adapter, by name.
        config: the model's config.
        places: E, the number of adapters that there is room for (`Adapters.put`); by default as many as are given.
        dtype: of the stacked parameters.

    Raises:
        ValueError: no adapter, more than places, a plan that does not fit the model, or steering that is not that of
            its plan or is not finite.
    """
    places = len(adapters) if places is None else places
    if not 1 <= len(adapters) <= places:
        raise ValueError(f"stack_adapters: {len(adapters)} adapters for {places} places; there must be 1 to {places}")
    plan = common_plan([plan for plan, _ in adapters.values()], config)
    fitted = [_fitted(name, plan, config, *adapter) for name, adapter in adapters.items()]
    free = [_zeros(steering_shapes(plan, config))] * (places - len(adapters))
    stack = lambda axis, *leaves: jnp.asarray(np.stack(leaves, axis), dtype)
    steering = jax.tree.map(stack, adapter_axes(plan, config), *fitted, *free)
    names = (*adapters, *(None for _ in free))
    return Adapters(config, plan, steering, names, tuple(next(_versions) for _ in names))


def common_plan(plans: Sequence[Plan], config: ModelConfig) -> Plan:
    """A plan that holds each of these, in its order of slots; see `stack_adapters`.

    Raises:
        ValueError: a plan does not fit the model.
    """
    groups: list[list[Slot]] = []  # the slots that share one, at most one of each plan
    before: set[tuple[int, int]] = set()  # pairs of groups whose order matters
    for plan in plans:
        validate_plan(plan, config)
        own: list[int] = []
        for slot in plan:
            shares = [at for at in range(len(groups)) if at not in own and _can_share([*groups[at], slot], config)]
            by_name = [at for at in shares if groups[at][0].name == slot.name]
            for at in (*by_name, *shares, len(groups)):
                pairs = before | {
                    (other, at) for other, earlier in zip(own, plan, strict=False) if _meet(earlier, slot)
                }
                if _order(len(groups) + 1, pairs) is not None:
                    break
            groups += [[]] if at == len(groups) else []
            groups[at].append(slot)
            own, before = [*own, at], pairs
    order = _order(len(groups), before)
    assert order is not None  # a group that was added comes last
    return _with_names([_union(groups[at], config) for at in order])


def _with_names(slots: Sequence[Slot]) -> Plan:
    """The slots with numbers behind names that were taken."""
    named: list[Slot] = []
    for slot in slots:
        taken = {other.name for other in named}
        names = itertools.chain([slot.name], (f"{slot.name}{number}" for number in itertools.count(2)))
        named.append(replace(slot, name=next(name for name in names if name not in taken)))
    return tuple(named)


def _meet(one: Slot, other: Slot) -> bool:
    """Whether the order of two slots matters."""
    return not set(one.sites).isdisjoint(other.sites)


def _order(count: int, before: set[tuple[int, int]]) -> list[int] | None:
    """0 to count - 1 so that the first of each pair comes before the second; None if that is impossible."""
    order: list[int] = []
    while len(order) < count:
        free = (at for at in range(count) if at not in order and all(a in order for a, b in before if b == at))
        if (at := next(free, None)) is None:
            return None
        order.append(at)
    return order


def adapter_axes(plan: Plan, config: ModelConfig) -> PyTree:
    """Which axis of each leaf of a stacked tree is that of the adapters, as for `jax.vmap`."""
    return jax.tree.map(lambda spec: spec.adapter_axis + 1, param_specs(plan, config), is_leaf=_is_spec)


def _is_spec(value: object) -> bool:
    return isinstance(value, ParamSpec)


def _alike(one: Slot, other: Slot) -> bool:
    """Whether two slots compute the same function, up to what parameters can make up for."""
    settings = lambda method: {
        field.name: getattr(method, field.name) for field in dataclasses.fields(method) if field.name not in method.free
    }
    return (
        type(one.method) is type(other.method)
        and one.positions == other.positions
        and settings(one.method) == settings(other.method)
    )


def _can_share(slots: Sequence[Slot], config: ModelConfig) -> bool:
    """Whether these slots can be one: the largest rank may be too large for the smallest site."""
    if not all(_alike(slots[0], slot) for slot in slots[1:]):
        return False
    try:
        validate_plan((_union(slots, config),), config)
    except ValueError:
        return False
    return True


def _union(slots: Sequence[Slot], config: ModelConfig) -> Slot:
    """One slot with the sites and layers of all."""
    first, *others = slots
    sites = tuple(site for site in SITES if any(site in slot.sites for slot in slots))
    layers = sorted({layer for slot in slots for layer in slot.active_layers(config.layers)})
    return replace(
        first,
        method=first.method.shared([slot.method for slot in others]),
        sites=first.sites if set(first.sites) == set(sites) else sites,
        layers=None if len(layers) == config.layers else tuple(layers),
    )


def _held(common: Plan, plan: Plan, config: ModelConfig) -> list[int]:
    """The slot of the common plan that holds each slot of a plan; by name where that is possible.

    Raises:
        ValueError: none does.
    """

    def holds(place: Slot, slot: Slot) -> bool:
        layers = set(slot.active_layers(config.layers)) <= set(place.active_layers(config.layers))
        fits = _alike(place, slot) and slot.method.restated({}, place.method) is not None
        return fits and layers and set(slot.sites) <= set(place.sites)

    def assign(found: list[int]) -> list[int] | None:
        if len(found) == len(plan):
            return found
        slot = plan[len(found)]
        start = max((at + 1 for at, other in zip(found, plan, strict=False) if _meet(other, slot)), default=0)
        places = [at for at in range(start, len(common)) if at not in found and holds(common[at], slot)]
        places.sort(key=lambda at: common[at].name != slot.name)
        return next(filter(None, (assign([*found, at]) for at in places)), None)

    if (held := assign([])) is not None:
        return held
    lost = next((slot for slot in plan if not any(holds(place, slot) for place in common)), None)
    what = "its slots have" if lost is None else f"slot {lost.name!r} ({format_plan((lost,))[0]}) has"
    raise ValueError(
        f"{what} no place in the common plan ({'; '.join(format_plan(common))}), which takes the same methods at the "
        "same positions in its order, of at most its ranks, at its sites and layers; stack it with the others"
    )


def _fitted(name: str, common: Plan, config: ModelConfig, plan: Plan, steering: Steering) -> PyTree:
    """An adapter's steering as a numpy tree of the common plan, zero where it has none.

    Raises:
        ValueError: the common plan cannot hold its plan, or the tree is not that of its plan or is not finite.
    """
    try:
        held = _held(common, plan, config)
        steering = _checked(config, plan, steering)
    except ValueError as error:
        raise ValueError(f"adapter {name!r}: {error}") from None
    tree = _zeros(steering_shapes(common, config))
    for slot, at in zip(plan, held, strict=True):
        layers = common[at].active_layers(config.layers)
        rows = [layers.index(layer) for layer in slot.active_layers(config.layers)]
        for site in slot.sites:
            params = slot.method.restated(steering[slot.name][site], common[at].method)
            assert params is not None
            for leaf, values in params.items():
                tree[common[at].name][site][leaf][rows, *map(slice, values.shape[1:])] = values
    return tree


def _checked(config: ModelConfig, plan: Plan, steering: Steering) -> PyTree:
    """The steering in numpy, in at least fp32.

    Raises:
        ValueError: it is not that of its plan, or it is not finite.
    """
    named = lambda tree: {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }
    shapes = lambda tree: {(path, leaf.shape) for path, leaf in named(tree).items()}
    if wrong := shapes(steering) ^ shapes(steering_shapes(plan, config)):
        raise ValueError(f"its steering is not that of its plan, at {min(wrong)[0]}: another plan, or another model")
    values = jax.tree.map(lambda leaf: np.asarray(leaf, np.promote_types(leaf.dtype, np.float32)), steering)
    for path, leaf in named(values).items():
        if not np.isfinite(leaf).all():
            # Other tokens multiply it by zeros, and 0 · NaN is NaN.
            raise ValueError(f"{path} holds NaN or infinity, which would reach the requests of other adapters")
    return values


def _zeros(shapes: PyTree) -> PyTree:
    return jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes)


@partial(jax.jit, static_argnames="axes")
def _written(leaves: Sequence[Array], new: Sequence[Array], place: Array, *, axes: tuple[int, ...]) -> list[Array]:
    """The leaves of a stacked tree with those of one adapter in a place."""
    write = jax.lax.dynamic_update_index_in_dim
    return [write(*each, place, axis) for *each, axis in zip(leaves, new, axes, strict=True)]
