"""Updates: changes of (base, steering), whatever made them. Full fine-tuning, LoRA and steering all have this form.

An update is a `Params` with the structure of the model's trees, and None for a leaf that does not change.
"""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from jaxsteer.folding import fold_weights
from jaxsteer.params import Params
from jaxsteer.steering import with_leaf
from jaxsteer.types import Array, Plan, PyTree, Steering

_is_none = lambda leaf: leaf is None


def difference(after: Params, before: Params) -> Params:
    """after − before, leaf by leaf; None where both hold the very same array object.

    Args:
        after: a fine-tuned base, trained steering, or both.
        before: the pretrained base, fresh steering, or both.

    Raises:
        ValueError: they differ in structure, or in the shape of a leaf.
    """
    _check(after, before, "the model after the update", whole=True)
    return jax.tree.map(lambda a, b: None if a is b else a - b.astype(a.dtype), after, before)


def merged(plan: Plan, base: PyTree, steering: Steering) -> Params:
    """What LoRA and other weight methods do to the weights: (W + s B A) − W for every kernel that the plan changes.

    Computed in at least fp32, so that it includes what merging into half-precision weights would round away.

    Raises:
        ValueError: a slot that cannot be merged into the weights.
    """
    wide = jax.tree.map(lambda leaf: jnp.asarray(leaf, np.promote_types(leaf.dtype, np.float32)), base)
    after, rest, _ = fold_weights(plan, wide, steering)
    if rest:
        raise ValueError(
            f"slots {[slot.name for slot in rest]} cannot be merged into the weights: they do not change the weights "
            "for all tokens; use the change of their steering tree as the update instead, see `difference`"
        )
    return difference(Params(after, {}), Params(wide, {}))


def written(plan: Plan, base: PyTree, steering: Steering) -> tuple[Params, Params]:
    """(θ, δ), θ with the steering switched off and θ + δ with the steering as given.

    δ holds the parameters that methods write with (U, B, v). They are zero at θ, which makes it the plain model; what
    methods read with is the same in both, because if D moved too, U D would start at second order.

    Raises:
        ValueError: a slot whose method declares no parameters that it writes with.
    """
    off = steering
    for slot in plan:
        if not slot.method.writes:
            raise ValueError(f"slot {slot.name!r}: its method declares no parameters that it writes with")
        for site in slot.sites:
            for name, _ in slot.method.writes:
                off = with_leaf(off, (slot.name, site, name), jnp.zeros_like(steering[slot.name][site][name]))
    at = Params(base, off)
    return at, difference(Params(base, steering), at)


def only_layer(update: Params, layer: Array | int) -> Params:
    """The part of an update that changes one block's weights.

    Raises:
        ValueError: it changes no weights of the blocks.
    """
    blocks = (update.base or {}).get("blocks")
    if not jax.tree.leaves(blocks):
        raise ValueError("the update changes no weights of the blocks, so no part of it belongs to one layer")

    def keep(leaf: Array) -> Array:
        here = jnp.arange(leaf.shape[0]) == layer
        return jnp.where(here.reshape((-1,) + (1,) * (leaf.ndim - 1)), leaf, jnp.zeros_like(leaf))

    return Params({"blocks": jax.tree.map(keep, blocks)}, {})


def complete(update: Params, at: Params) -> Params:
    """The update with the structure of `at`: None for what it leaves out, each leaf in the dtype of the one it changes.

    Args:
        update: may lack branches of the trees, or have None for them.
        at: the whole trees, (base, steering).

    Raises:
        ValueError: a leaf that the model does not have, or one of another shape; no leaf at all.
    """
    _check(update, at, "the update", whole=False)
    base, steering = (_fill(part, whole) for part, whole in zip(update, at, strict=True))
    if not jax.tree.leaves((base, steering)):
        raise ValueError("the update changes nothing: it has no leaf")
    return Params(base, steering)


def split_at(at: Params, update: Params) -> tuple[Params, Params]:
    """(leaves that a complete update changes, leaves that it does not); `jaxsteer.params.combine` is the inverse."""
    changed = jax.tree.map(lambda u, a: None if u is None else a, update, at, is_leaf=_is_none)
    unchanged = jax.tree.map(lambda u, a: a if u is None else None, update, at, is_leaf=_is_none)
    return changed, unchanged


def moved(point: Params, update: Params, scale: Array | float) -> Params:
    """point + scale · update, each leaf in the point's dtype; None stays None."""

    def move(p: Array, u: Array) -> Array:
        wide = np.promote_types(p.dtype, np.float32)
        return (p.astype(wide) + jnp.asarray(scale).astype(wide) * u.astype(wide)).astype(p.dtype)

    return jax.tree.map(move, point, update)


def _fill(part: PyTree, whole: PyTree) -> PyTree:
    """A part of a nested dict with the structure of the whole, None for what it lacks."""
    if isinstance(whole, Mapping):
        return {key: _fill(None if part is None else part.get(key), value) for key, value in whole.items()}
    return None if part is None else jnp.asarray(part).astype(whole.dtype)


def _check(tree: Params, at: Params, what: str, *, whole: bool) -> None:
    """Raise ValueError if `tree` has a leaf that `at` lacks, one of another shape, or (if whole) lacks one."""
    by_path = lambda t: {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(t)}
    leaves, expected = by_path(tree), by_path(at)
    if unknown := sorted(set(leaves) - set(expected)):
        raise ValueError(
            f"{what} has {unknown[0]}, which the model does not have (it has {len(expected)} leaves, such as "
            f"{next(iter(expected), 'none')}); both must belong to one model and plan"
        )
    if whole and (missing := sorted(set(expected) - set(leaves))):
        raise ValueError(f"{what} lacks {missing[0]}; both must belong to one model and plan")
    for path, leaf in leaves.items():
        if jnp.shape(leaf) != jnp.shape(expected[path]):
            raise ValueError(
                f"{what}: {path} is {jnp.shape(leaf)}, the model's is {jnp.shape(expected[path])}; both must be of one "
                "architecture and plan"
            )
