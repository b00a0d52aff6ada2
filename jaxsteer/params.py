"""Which leaves of (base, steering) train: a label for each, and the trees split by it."""

from __future__ import annotations

from typing import NamedTuple

import jax

from jaxsteer.types import Plan, PyTree, Steering


class Params(NamedTuple):
    """A model's base and steering trees. After `partition`, None marks the leaves that the other half holds."""

    base: PyTree
    steering: Steering


def param_labels(params: Params, plan: Plan, *, train_base: bool = False, frozen: tuple[str, ...] = ()) -> PyTree:
    """Label every leaf "weights", "activations" (its optimizer group) or "frozen".

    Args:
        params: the complete trees.
        plan: the steering plan; the kind of a slot's method decides the slot's group.
        train_base: train the base weights (full fine-tuning).
        frozen: names of slots that do not train. A method's constants never do.

    Returns:
        A tree of labels with the structure of `params`.

    Raises:
        ValueError: `frozen` names a slot that is not in the plan.
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
    """Split into (trained, frozen): two trees of one structure, each with None where the other has the leaf.

    JAX does not count None as a leaf, so gradients, optimizer state and checkpoints hold nothing for frozen leaves.

    Args:
        params: the complete trees, of arrays, shapes or shardings.
        labels: from `param_labels`.
    """
    trained = jax.tree.map(lambda leaf, label: None if label == "frozen" else leaf, params, labels)
    frozen = jax.tree.map(lambda leaf, label: leaf if label == "frozen" else None, params, labels)
    return trained, frozen


def combine(trained: Params, frozen: Params) -> Params:
    """Undo `partition`: each leaf from the half that has it."""
    pick = lambda a, b: b if a is None else a
    return jax.tree.map(pick, trained, frozen, is_leaf=lambda leaf: leaf is None)
