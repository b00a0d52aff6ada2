"""What trains: a label for every leaf of (base, steering), and trees partitioned by it."""

from __future__ import annotations

from typing import NamedTuple

import jax

from jaxsteer.types import Plan, PyTree, Steering


class Params(NamedTuple):
    """The two trees of a model. Where a leaf is not part of one (frozen, or trained), it holds None."""

    base: PyTree
    steering: Steering


def param_labels(params: Params, plan: Plan, *, train_base: bool = False, frozen: tuple[str, ...] = ()) -> PyTree:
    """A label for every leaf: "weights", "activations" or "frozen".

    Args:
        params: the whole trees.
        plan: decides, by each method's kind, the group of a slot.
        train_base: the base weights train (full fine-tuning).
        frozen: names of slots that do not train; constants of a method never do.

    Raises:
        ValueError: a frozen slot that is not in the plan.
    """
    if unknown := sorted(set(frozen) - {slot.name for slot in plan}):
        raise ValueError(f"cannot freeze {unknown}: the plan's slots are {[slot.name for slot in plan]}")
    base = jax.tree.map(lambda _: "weights" if train_base else "frozen", params.base)
    steering: PyTree = {}
    for slot in plan:
        group = "frozen" if slot.name in frozen else f"{slot.method.kind}s"
        steering[slot.name] = {
            site: {name: "frozen" if name in slot.method.constants else group for name in tree}
            for site, tree in params.steering[slot.name].items()
        }
    return Params(base, steering)


def partition(params: Params, labels: PyTree) -> tuple[Params, Params]:
    """(trained, frozen): two trees of the same form, each with None where the leaf is in the other.

    None is no leaf to JAX: gradients, optimizer state and checkpoints of the trained tree hold nothing for it.
    """
    trained = jax.tree.map(lambda leaf, label: None if label == "frozen" else leaf, params, labels)
    frozen = jax.tree.map(lambda leaf, label: leaf if label == "frozen" else None, params, labels)
    return trained, frozen


def combine(trained: Params, frozen: Params) -> Params:
    """Undo `partition`."""
    pick = lambda a, b: b if a is None else a
    return jax.tree.map(pick, trained, frozen, is_leaf=lambda leaf: leaf is None)
