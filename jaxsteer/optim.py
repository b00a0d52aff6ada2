"""What trains and how: labels over (base, steering), the split into trained and frozen leaves, and the optimizer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import optax

from jaxsteer.orthogonality import HIGHEST, NO_SCALES, Orthogonality, Scales, project_orthogonal
from jaxsteer.steering import with_leaf
from jaxsteer.types import Array, Plan, PyTree

Schedule = Literal["constant", "linear", "cosine"]
Group = Literal["weights", "activations"]
Rate = float | Array


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
    weights_schedule: Schedule | None = None
    """Of the weight parameters; None = schedule."""
    weights_warmup: float | None = None
    """Of the weight parameters; None = warmup."""
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
        for name in ("warmup", "weights_warmup"):
            share = getattr(self, name)
            if share is not None and not 0 <= share < 1:
                raise ValueError(f"optim.{name}: a share of the steps, at least 0 and below 1; got {share}")
        if self.clip is not None and not self.clip > 0:
            raise ValueError(f"optim.clip: must be above 0, or None for no clipping; got {self.clip}")
        for name in ("schedule", "weights_schedule"):
            kind = getattr(self, name)
            if kind not in get_args(Schedule) and not (name == "weights_schedule" and kind is None):
                raise ValueError(f"optim.{name}: constant, linear or cosine; got {kind!r}")

    def peak(self, group: Group) -> float:
        """The peak learning rate of a group."""
        return self.weights_lr if group == "weights" and self.weights_lr is not None else self.lr


def make_schedule(config: OptimConfig, group: Group, steps: int, peak: Rate | None = None) -> optax.Schedule:
    """Learning rate of a group at each step: a linear warm-up to the peak, then its schedule down to 0 at `steps`.

    Args:
        peak: instead of the config's; may be traced, so that runs of several rates are one program.
    """
    kind, share = config.schedule, config.warmup
    if group == "weights":
        kind = config.weights_schedule or kind
        share = share if config.weights_warmup is None else config.weights_warmup
    warmup = round(share * steps)
    after = {
        "constant": optax.constant_schedule(1.0),
        "linear": optax.linear_schedule(1.0, 0.0, max(1, steps - warmup)),
        "cosine": optax.cosine_decay_schedule(1.0, max(1, steps - warmup)),
    }[kind]
    shape = optax.join_schedules([optax.linear_schedule(0.0, 1.0, warmup), after], [warmup]) if warmup else after
    height = config.peak(group) if peak is None else peak
    return lambda step: height * shape(step)


def make_optimizer(
    config: OptimConfig,
    labels: PyTree,
    steps: int,
    plan: Plan = (),
    orthogonality: Orthogonality = Orthogonality("none"),  # noqa: B008  # frozen
    peaks: Mapping[Group, Rate] | None = None,
    scales_of: Callable[[PyTree], Scales] = lambda base: NO_SCALES,
) -> optax.GradientTransformation:
    """Clip the global norm, then AdamW with a learning rate for each group; then what the plan asks to be kept.

    Args:
        config: rates and schedules.
        labels: of the whole tree (`param_labels`); the frozen leaves may be None in the trees that it is used on.
        steps: length of the schedule.
        plan: its methods' orthonormal parameters stay so; needed for that, and for a projection.
        orthogonality: a projection goes around the optimizer where its mode says so (resolved, not `auto`).
        peaks: learning rates instead of the config's, possibly traced.
        scales_of: for a projection, see `project_orthogonal`.

    Raises:
        ValueError: fewer than 1 step.
    """
    if steps < 1:
        raise ValueError(f"a schedule needs at least 1 step, got {steps}")

    def adam(group: Group) -> optax.GradientTransformation:
        rate = make_schedule(config, group, steps, (peaks or {}).get(group))
        return optax.adamw(rate, b1=config.b1, b2=config.b2, eps=config.eps, weight_decay=config.weight_decay)

    groups = {group: adam(group) for group in get_args(Group)}
    trained = jax.tree.map(lambda label: None if label == "frozen" else label, labels)
    clip = optax.identity() if config.clip is None else optax.clip_by_global_norm(config.clip)
    tx = optax.chain(clip, optax.partition(groups, trained))
    if orthogonality.mode == "projection":
        tx = project_orthogonal(tx, plan, orthogonality, scales_of)
    # Outermost: making rows orthonormal keeps their span, so a projection survives it.
    return keep_orthonormal(tx, plan) if any(slot.method.orthonormal for slot in plan) else tx


def keep_orthonormal(inner: optax.GradientTransformation, plan: Plan) -> optax.GradientTransformationExtraArgs:
    """Wrap an optimizer so that the methods' orthonormal parameters stay orthonormal: R Rᵀ = I.

    Riemannian descent on the Stiefel manifold: the gradient loses its part that would stretch the rows,
    G − sym(G Rᵀ) R; after the inner update, R + u is retracted by its QR decomposition. Nothing of D × D is formed.
    """
    inner = optax.with_extra_args_support(inner)

    def each(tree: PyTree, params: PyTree, change: Callable[[Array, Array], Array]) -> PyTree:
        steering = tree.steering
        for slot in plan:
            for site in slot.sites:
                for name in slot.method.orthonormal:
                    leaf = steering[slot.name][site][name]
                    if leaf is not None:  # a frozen one
                        new = change(leaf, params.steering[slot.name][site][name])
                        steering = with_leaf(steering, (slot.name, site, name), new)
        return tree._replace(steering=steering)

    def update(grads: PyTree, state: PyTree, params: PyTree | None = None, **extra: Any) -> tuple[PyTree, PyTree]:
        if params is None:
            raise ValueError("keep_orthonormal needs the parameters: tx.update(grads, state, params)")
        updates, state = inner.update(each(grads, params, tangent), state, params, **extra)
        return each(updates, params, lambda u, r: retract(r + u) - r), state

    return optax.GradientTransformationExtraArgs(inner.init, update)


def tangent(gradient: Array, rows: Array) -> Array:
    """G − sym(G Rᵀ) R, the part of G [..., R, D] that keeps orthonormal rows R orthonormal to first order."""
    inner = jnp.einsum("...rd,...sd->...rs", gradient, rows, precision=HIGHEST)
    symmetric = (inner + inner.swapaxes(-1, -2)) / 2
    return gradient - jnp.einsum("...rs,...sd->...rd", symmetric, rows, precision=HIGHEST)


def retract(rows: Array) -> Array:
    """The orthonormal rows of a QR decomposition of [..., R, D], each on the side of the row it came from."""
    q, r = jnp.linalg.qr(rows.swapaxes(-1, -2))
    sign = jnp.where(jnp.diagonal(r, axis1=-2, axis2=-1) < 0, -1, 1).astype(q.dtype)
    return (q * sign[..., None, :]).swapaxes(-1, -2)


def learning_rates(config: OptimConfig, step: Array, steps: int) -> dict[str, Array]:
    """The rate of each group at a step, for the log."""
    return {group: jnp.asarray(make_schedule(config, group, steps)(step)) for group in get_args(Group)}
