"""An update: a change of (base, steering), whatever made it. Full fine-tuning, LoRA and steering are all of this form.

It is a `Params` of the same form as the model's own trees, with None where a leaf stays as it is.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxsteer.params import Params
from jaxsteer.steering import fold_weights, with_leaf
from jaxsteer.types import Array, Plan, PyTree, Steering

_is_none = lambda leaf: leaf is None


def difference(after: Params, before: Params) -> Params:
    """after − before, leaf by leaf; None where both hold the very same array, which an update then leaves alone.

    Args:
        after, before: two points of one model: a fine-tuned and a pretrained base, trained and fresh steering, or both.

    Raises:
        ValueError: they differ in form, or in the shape of a leaf.
    """
    _check(after, before, "the model after the update", whole=True)
    return jax.tree.map(lambda a, b: None if a is b else a - b.astype(a.dtype), after, before)


def merged(plan: Plan, base: PyTree, steering: Steering) -> Params:
    """What LoRA and the like do to the weights: (W + s B A) − W for every kernel that the plan changes.

    In at least fp32: what merging into half precision would round away is still part of the update.

    Raises:
        ValueError: a slot that cannot be merged into the weights.
    """
    wide = jax.tree.map(lambda leaf: jnp.asarray(leaf, np.promote_types(leaf.dtype, np.float32)), base)
    after, rest, _ = fold_weights(plan, wide, steering)
    if rest:
        raise ValueError(
            f"slots {[slot.name for slot in rest]} cannot be merged into the weights: they are no weight updates of "
            "all tokens; use their steering trees as the update instead, see `difference`"
        )
    return difference(Params(after, {}), Params(wide, {}))


def written(plan: Plan, base: PyTree, steering: Steering) -> tuple[Params, Params]:
    """(θ, δ) from steering switched off to steering as it is: δ is what its methods write with (U, B, v).

    At θ these are zero, so it is the plain model; what they read with stays, or U D would begin at order two.

    Raises:
        ValueError: a slot whose method names nothing that it writes with.
    """
    off = steering
    for slot in plan:
        if not slot.method.writes:
            raise ValueError(f"slot {slot.name!r}: its method names no parameters that it writes with")
        for site in slot.sites:
            for name, _ in slot.method.writes:
                off = with_leaf(off, (slot.name, site, name), jnp.zeros_like(steering[slot.name][site][name]))
    at = Params(base, off)
    return at, difference(Params(base, steering), at)


def only_layer(update: Params, layer: Array | int) -> Params:
    """The update of one block's weights alone; everything before that block stays as it was.

    Raises:
        ValueError: it changes no weights of the blocks.
    """
    blocks = (update.base or {}).get("blocks")
    if not jax.tree.leaves(blocks):
        raise ValueError("the update changes no weights of the blocks, so it has no part that is one layer's")

    def keep(leaf: Array) -> Array:
        here = jnp.arange(leaf.shape[0]) == layer
        return jnp.where(here.reshape((-1,) + (1,) * (leaf.ndim - 1)), leaf, jnp.zeros_like(leaf))

    return Params({"blocks": jax.tree.map(keep, blocks)}, {})


def complete(update: Params, at: Params) -> Params:
    """The update in the form of `at`: None for what it leaves out, each leaf in the dtype of the one it changes.

    Args:
        update: may lack branches of the trees, or hold None for them.
        at: the whole trees, (base, steering).

    Raises:
        ValueError: a leaf that the model does not have, or one of another shape; nothing to change at all.
    """
    _check(update, at, "the update", whole=False)
    base, steering = (_fill(part, whole) for part, whole in zip(update, at, strict=True))
    if not jax.tree.leaves((base, steering)):
        raise ValueError("the update changes nothing: it has no leaf")
    return Params(base, steering)


def split_at(at: Params, update: Params) -> tuple[Params, Params]:
    """(what a complete update changes, what it leaves alone): `jaxsteer.optim.merge` puts them together again."""
    changed = jax.tree.map(lambda u, a: None if u is None else a, update, at, is_leaf=_is_none)
    still = jax.tree.map(lambda u, a: a if u is None else None, update, at, is_leaf=_is_none)
    return changed, still


def moved(point: Params, update: Params, scale: Array | float) -> Params:
    """point + scale · update, each leaf in the point's dtype; None stays None."""

    def move(p: Array, u: Array) -> Array:
        wide = np.promote_types(p.dtype, np.float32)
        return (p.astype(wide) + jnp.asarray(scale).astype(wide) * u.astype(wide)).astype(p.dtype)

    return jax.tree.map(move, point, update)


def _fill(part: Any, whole: Any) -> Any:
    if isinstance(whole, Mapping):
        return {key: _fill(None if part is None else part.get(key), value) for key, value in whole.items()}
    return None if part is None else jnp.asarray(part).astype(whole.dtype)


def _check(tree: Params, at: Params, what: str, *, whole: bool) -> None:
    """Raise ValueError where `tree` has a leaf that `at` lacks, one of another shape, or (if whole) too few."""
    leaves = lambda t: {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(t)}
    got, there = leaves(tree), leaves(at)
    if strange := sorted(set(got) - set(there)):
        raise ValueError(
            f"{what} has {strange[0]}, which the model has not (it has {len(there)} leaves, such as "
            f"{next(iter(there), 'none')}); base and steering must be those of one model and plan"
        )
    if whole and (missing := sorted(set(there) - set(got))):
        raise ValueError(f"{what} lacks {missing[0]}; base and steering must be those of one model and plan")
    for path, leaf in got.items():
        if jnp.shape(leaf) != jnp.shape(there[path]):
            raise ValueError(
                f"{what}: {path} is {jnp.shape(leaf)}, the model's is {jnp.shape(there[path])}; both must be of one "
                "architecture and plan"
            )
