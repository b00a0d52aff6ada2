"""What trains and how: labels over (base, steering), the split into trained and frozen leaves, and optax.partition."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxsteer.types import Array, Plan, PyTree, Steering

Schedule = Literal["constant", "linear", "cosine"]


class Params(NamedTuple):
    """The two trees of a model. Where a leaf is not part of one (frozen, or trained), it holds None."""

    base: PyTree
    steering: Steering


@dataclass(frozen=True)
class OptimConfig:
    """Adam with a warm-up and a schedule, for two groups of parameters."""

    lr: float = 9e-4
    """Peak learning rate of the activation parameters (steering), and of the weights too unless set apart."""
    weights_lr: float | None = None
    """Peak learning rate of weight parameters (LoRA, the base in full fine-tuning); None = lr."""
    schedule: Schedule = "linear"
    """How the rate goes down after the warm-up, to 0 at the last step: constant (not at all), linear or cosine."""
    warmup: float = 0.03
    """Share of the steps over which the rate rises from 0."""
    weight_decay: float = 0.0
    """Decoupled weight decay (AdamW), for both groups."""
    b1: float = 0.9
    """Decay of Adam's first moment."""
    b2: float = 0.999
    """Decay of Adam's second moment."""
    eps: float = 1e-8
    """Added to the root of Adam's second moment."""
    clip: float | None = 1.0
    """Largest global norm of the gradient, over both groups together; None = no clipping."""

    def __post_init__(self) -> None:
        """Reject settings that could not train."""
        for name in ("lr", "weights_lr"):
            rate = getattr(self, name)
            if rate is not None and not rate > 0:
                raise ValueError(f"optim.{name}: a learning rate must be above 0, got {rate}")
        if not 0 <= self.warmup < 1:
            raise ValueError(f"optim.warmup: a share of the steps, at least 0 and below 1; got {self.warmup}")
        if self.clip is not None and not self.clip > 0:
            raise ValueError(f"optim.clip: must be above 0, or None for no clipping; got {self.clip}")
        if self.schedule not in ("constant", "linear", "cosine"):
            raise ValueError(f"optim.schedule: constant, linear or cosine; got {self.schedule!r}")


def param_labels(params: Params, plan: Plan, *, train_base: bool = False, frozen: tuple[str, ...] = ()) -> PyTree:
    """A label for every leaf: "weights", "activations" or "frozen".

    Args:
        params: the whole trees.
        plan: decides, by each method's kind, the group of a slot.
        train_base: the base weights train (full fine-tuning).
        frozen: names of slots that do not train.

    Raises:
        ValueError: a frozen slot that is not in the plan.
    """
    if unknown := sorted(set(frozen) - {slot.name for slot in plan}):
        raise ValueError(f"cannot freeze {unknown}: the plan's slots are {[slot.name for slot in plan]}")
    group = {slot.name: "frozen" if slot.name in frozen else f"{slot.method.kind}s" for slot in plan}
    base = jax.tree.map(lambda _: "weights" if train_base else "frozen", params.base)
    return Params(
        base, {name: jax.tree.map(lambda _, n=name: group[n], tree) for name, tree in params.steering.items()}
    )


def split(params: Params, labels: PyTree) -> tuple[Params, Params]:
    """(trained, frozen): two trees of the same form, each with None where the leaf is in the other.

    None is no leaf to JAX: gradients, optimizer state and checkpoints of the trained tree hold nothing for it.
    """
    trained = jax.tree.map(lambda leaf, label: None if label == "frozen" else leaf, params, labels)
    frozen = jax.tree.map(lambda leaf, label: leaf if label == "frozen" else None, params, labels)
    return trained, frozen


def merge(trained: Params, frozen: Params) -> Params:
    """Undo `split`."""
    pick = lambda a, b: b if a is None else a
    return jax.tree.map(pick, trained, frozen, is_leaf=lambda leaf: leaf is None)


def make_schedule(config: OptimConfig, peak: float, steps: int) -> optax.Schedule:
    """Learning rate at each step: a linear warm-up to `peak`, then `config.schedule` down to 0 at `steps`."""
    warmup = round(config.warmup * steps)
    after = {
        "constant": optax.constant_schedule(peak),
        "linear": optax.linear_schedule(peak, 0.0, max(1, steps - warmup)),
        "cosine": optax.cosine_decay_schedule(peak, max(1, steps - warmup)),
    }[config.schedule]
    return optax.join_schedules([optax.linear_schedule(0.0, peak, warmup), after], [warmup]) if warmup else after


def make_optimizer(config: OptimConfig, labels: PyTree, steps: int) -> optax.GradientTransformation:
    """Clip the global norm, then AdamW with a learning rate for each group.

    Args:
        config: rates and schedule.
        labels: of the whole tree (`param_labels`); the frozen leaves may be None in the trees that it is used on.
        steps: length of the schedule.

    Raises:
        ValueError: fewer than 1 step.
    """
    if steps < 1:
        raise ValueError(f"a schedule needs at least 1 step, got {steps}")

    def adam(peak: float) -> optax.GradientTransformation:
        rate = make_schedule(config, peak, steps)
        return optax.adamw(rate, b1=config.b1, b2=config.b2, eps=config.eps, weight_decay=config.weight_decay)

    groups = {
        "weights": adam(config.weights_lr or config.lr),
        "activations": adam(config.lr),
    }
    trained = jax.tree.map(lambda label: None if label == "frozen" else label, labels)
    clip = optax.identity() if config.clip is None else optax.clip_by_global_norm(config.clip)
    return optax.chain(clip, optax.partition(groups, trained))


def learning_rates(config: OptimConfig, step: Array, steps: int) -> dict[str, Array]:
    """The rate of each group at a step, for the log."""
    peaks = {"activations": config.lr, "weights": config.weights_lr or config.lr}
    return {name: jnp.asarray(make_schedule(config, peak, steps)(step)) for name, peak in peaks.items()}


def count_trained(params: Params, labels: PyTree) -> int:
    """Number of scalars that train."""
    trained: Any = split(params, labels)[0]
    return sum(int(leaf.size) for leaf in jax.tree.leaves(trained))
