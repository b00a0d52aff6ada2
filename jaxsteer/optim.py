"""The optimizer: AdamW with a learning rate and a schedule for each group of parameters, and orthonormal parameters."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import optax

from jaxsteer.orthogonality import HIGHEST, NO_SCALES, Orthogonality, Scales, project_orthogonal
from jaxsteer.params import Params
from jaxsteer.ranges import Fraction, NonNegative, Positive, check_ranges
from jaxsteer.steering import with_leaf
from jaxsteer.types import Array, Plan, PyTree

Schedule = Literal["constant", "linear", "cosine"]
Group = Literal["weights", "activations"]
Rate = float | Array


@dataclass(frozen=True)
class OptimConfig:
    """AdamW with warmup and a schedule, for two groups of parameters: weights and activations."""

    lr: Positive = 9e-4
    """Peak learning rate of the steering (activation) parameters, and of weight parameters unless weights_lr is set."""
    weights_lr: Positive | None = None
    """Peak learning rate of weight parameters (LoRA; the base in full fine-tuning). None: same as lr."""
    schedule: Schedule = "linear"
    """Learning rate after warmup: constant, or linear or cosine decay to 0 at the last step."""
    warmup: Fraction = 0.03
    """Fraction of the steps used for linear warmup from 0."""
    weights_schedule: Schedule | None = None
    """Schedule of the weight parameters. None: same as schedule."""
    weights_warmup: Fraction | None = None
    """Warmup fraction of the weight parameters. None: same as warmup."""
    weight_decay: NonNegative = 0.0
    """Decoupled weight decay (AdamW), applied to both groups."""
    b1: Fraction = 0.9
    """Decay rate of Adam's first moment."""
    b2: Fraction = 0.999
    """Decay rate of Adam's second moment."""
    eps: Positive = 1e-8
    """Added to the square root of Adam's second moment."""
    clip: Positive | None = 1.0
    """Clip the gradient to this global norm, taken over both groups. None: no clipping."""

    def __post_init__(self) -> None:
        """Reject invalid settings."""
        check_ranges(self, "optim.")
        for name in ("schedule", "weights_schedule"):
            kind = getattr(self, name)
            if kind not in get_args(Schedule) and not (name == "weights_schedule" and kind is None):
                raise ValueError(f"optim.{name}: the schedule must be constant, linear or cosine; got {kind!r}")

    def peak(self, group: Group) -> float:
        """The peak learning rate of a group."""
        return self.weights_lr if group == "weights" and self.weights_lr is not None else self.lr

    def schedule_of(self, group: Group, steps: int) -> tuple[Schedule, int]:
        """The schedule of a group, and its number of warmup steps."""
        kind, share = self.schedule, self.warmup
        if group == "weights":
            kind = self.weights_schedule or kind
            share = share if self.weights_warmup is None else self.weights_warmup
        return kind, round(share * steps)


def make_schedule(config: OptimConfig, group: Group, steps: int, peak: Rate | None = None) -> optax.Schedule:
    """The learning rate of a group as a function of the step: linear warmup to the peak, then the decay.

    Args:
        config: rates and schedules.
        group: of parameters.
        steps: total number of steps.
        peak: overrides the config's peak; may be traced, so that one program can train at several rates.
    """
    kind, warmup = config.schedule_of(group, steps)
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
    """Clip the global norm, apply AdamW with each group's learning rate, then the constraints of the plan.

    Args:
        config: rates and schedules.
        labels: from `param_labels`, for the complete tree; the optimizer then works on its trained half.
        steps: total number of steps of the schedules.
        plan: the steering plan; needed to keep parameters orthonormal (LoReFT) and for a projection.
        orthogonality: resolved (not `auto`); in mode projection, the optimizer is wrapped by `project_orthogonal`.
        peaks: override the config's learning rates; may be traced.
        scales_of: see `project_orthogonal`.

    Raises:
        ValueError: fewer than 1 step.
    """
    if steps < 1:
        raise ValueError(f"the optimizer's schedule needs at least 1 step, got {steps}")

    def adam(group: Group) -> optax.GradientTransformation:
        rate = make_schedule(config, group, steps, (peaks or {}).get(group))
        return optax.adamw(rate, b1=config.b1, b2=config.b2, eps=config.eps, weight_decay=config.weight_decay)

    groups = {group: adam(group) for group in get_args(Group)}
    trained = jax.tree.map(lambda label: None if label == "frozen" else label, labels)
    clip = optax.identity() if config.clip is None else optax.clip_by_global_norm(config.clip)
    tx = optax.chain(clip, optax.partition(groups, trained))
    if orthogonality.mode == "projection":
        tx = project_orthogonal(tx, plan, orthogonality, scales_of)
    # Outermost: orthonormalising rows keeps their span, so the projection is preserved.
    return keep_orthonormal(tx, plan) if any(slot.method.orthonormal for slot in plan) else tx


def keep_orthonormal(inner: optax.GradientTransformation, plan: Plan) -> optax.GradientTransformationExtraArgs:
    """Wrap an optimizer so that the methods' orthonormal parameters keep orthonormal rows: R Rᵀ = I.

    Riemannian descent on the Stiefel manifold: the gradient becomes the tangent vector G − sym(G Rᵀ) R, and after the
    inner update R + u is retracted by a QR decomposition. No D × D matrix is formed.

    Args:
        inner: the optimizer, on gradients and parameters that are `jaxsteer.params.Params`.
        plan: the steering plan, whose methods name their orthonormal parameters.
    """
    inner = optax.with_extra_args_support(inner)
    paths = [(slot.name, site, name) for slot in plan for site in slot.sites for name in slot.method.orthonormal]

    def map_orthonormal(change: Callable[[Array, Array], Array], tree: Params, params: Params) -> Params:
        steering = tree.steering
        for path in paths:
            slot, site, name = path
            leaf = steering[slot][site][name]
            if leaf is not None:  # None: frozen
                steering = with_leaf(steering, path, change(leaf, params.steering[slot][site][name]))
        return tree._replace(steering=steering)

    def update(
        grads: Params, state: optax.OptState, params: Params | None = None, **extra: Any
    ) -> tuple[Params, optax.OptState]:
        if params is None:
            raise ValueError("keep_orthonormal needs the parameters: tx.update(grads, state, params)")
        updates, state = inner.update(map_orthonormal(tangent, grads, params), state, params, **extra)
        return map_orthonormal(lambda u, r: retract(r + u) - r, updates, params), state

    return optax.GradientTransformationExtraArgs(inner.init, update)


def tangent(gradient: Array, rows: Array) -> Array:
    """G − sym(G Rᵀ) R, the part of a gradient that keeps orthonormal rows orthonormal to first order.

    Args:
        gradient: G [..., R, D].
        rows: R [..., R, D], orthonormal.
    """
    inner = jnp.einsum("...rd,...sd->...rs", gradient, rows, precision=HIGHEST)
    symmetric = (inner + inner.swapaxes(-1, -2)) / 2
    return gradient - jnp.einsum("...rs,...sd->...rd", symmetric, rows, precision=HIGHEST)


def retract(rows: Array) -> Array:
    """Orthonormal rows from a QR decomposition of [..., R, D], signed so that orthonormal rows are unchanged."""
    q, r = jnp.linalg.qr(rows.swapaxes(-1, -2))
    sign = jnp.where(jnp.diagonal(r, axis1=-2, axis2=-1) < 0, -1, 1).astype(q.dtype)
    return (q * sign[..., None, :]).swapaxes(-1, -2)


def learning_rates(config: OptimConfig, step: int, steps: int) -> dict[Group, float]:
    """The learning rate of each group at a step, for the log.

    The values are those of `make_schedule`, computed on the host in plain Python: no device is involved.

    Args:
        config: rates and schedules.
        step: number of steps done before this one, from 0.
        steps: total number of steps.

    Returns:
        Learning rate by group.
    """

    def rate(group: Group) -> float:
        kind, warmup = config.schedule_of(group, steps)
        if step < warmup:
            return config.peak(group) * step / warmup
        done = min(1.0, (step - warmup) / max(1, steps - warmup))
        decay = {"constant": 1.0, "linear": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2}
        return config.peak(group) * decay[kind]

    return {group: rate(group) for group in get_args(Group)}
