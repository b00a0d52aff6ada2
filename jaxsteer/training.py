"""One training step as a pure function: accumulate gradients of what trains, add the penalties once, update."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxsteer.models.transformer import Model, write_scales
from jaxsteer.objective import supervised_loss, total_weight
from jaxsteer.orthogonality import Orthogonality, joint_overlap, overlap_penalty
from jaxsteer.params import Params, combine
from jaxsteer.steering import penalty
from jaxsteer.types import Array, Batch


class TrainState(NamedTuple):
    """What a step changes: the trained leaves, the optimizer's state, the number of steps done, and the run's key."""

    params: Params
    opt_state: optax.OptState
    step: Array
    key: Array


class Metrics(NamedTuple):
    """Of one step: mean cross-entropy (nats a supervised token), the penalties, the gradient's global norm before
    clipping, the supervised and real tokens of the batch, and the overlap Ω of LoRA and steering in each layer that
    has both, after the update. Scalar fp32 but for the overlap, fp32 [n].
    """

    loss: Array
    penalty: Array
    grad_norm: Array
    supervised: Array
    tokens: Array
    overlap: Array


def init_state(params: Params, tx: optax.GradientTransformation, key: Array) -> TrainState:
    """The state before the first step. `params` holds the trained leaves only, see `jaxsteer.params.partition`."""
    return TrainState(params, tx.init(params), jnp.zeros((), jnp.int32), key)


def train_step(
    state: TrainState,
    batch: Batch,
    frozen: Params,
    *,
    model: Model,
    tx: optax.GradientTransformation,
    orthogonality: Orthogonality = Orthogonality("none"),  # noqa: B008  # frozen
    skip_nonfinite: bool = False,
    loss: Callable[..., Array] = supervised_loss,
) -> tuple[TrainState, Metrics]:
    """Update the trained leaves on one batch: L = Σ weight · nll / Σ weight + penalties.

    Gradients exist for `state.params` alone: a frozen base costs no weight gradients and no optimizer state. The
    divisor is the supervised weight of the whole batch, so accumulating microbatches gives what one big batch would.

    Args:
        state: as made by `init_state`; may be donated.
        batch: fields [B, T], or [M, B, T] to accumulate over M microbatches.
        frozen: the leaves that do not train.
        model: static. tx: the optimizer, static.
        orthogonality: resolved for the plan (`Orthogonality.resolve`); its penalty joins the loss.
        skip_nonfinite: where the loss, the penalty or the gradient's norm is not finite, parameters and optimizer state
            (so the schedules too) stay as they were, bit for bit; only the number of the step goes on.
    """
    if batch.tokens.ndim == 2:
        batch = jax.tree.map(lambda field: field[None], batch)
    total = jnp.maximum(total_weight(batch), 1e-6)  # a batch with nothing to learn gives zeros, not NaN
    key = jax.random.fold_in(state.key, state.step)

    def share_of_loss(params: Params, micro: Batch, index: Array) -> Array:
        whole = combine(params, frozen)
        own = jax.random.fold_in(key, index)
        value = loss(model, whole.base, whole.steering, micro, own, train=True)
        return value / total.astype(value.dtype)

    def accumulate(carry: tuple, xs: tuple) -> tuple[tuple, None]:
        value, grads = jax.value_and_grad(share_of_loss)(state.params, *xs)
        return jax.tree.map(jnp.add, carry, (value.astype(jnp.float32), grads)), None

    zeros = (jnp.zeros((), jnp.float32), jax.tree.map(jnp.zeros_like, state.params))
    indices = jnp.arange(batch.tokens.shape[0])
    if batch.tokens.shape[0] == 1:
        (value, grads), _ = accumulate(zeros, jax.tree.map(lambda x: x[0], (batch, indices)))
    else:
        (value, grads), _ = jax.lax.scan(accumulate, zeros, (batch, indices))

    def penalties(params: Params) -> Array:
        whole = combine(params, frozen)
        scales = write_scales(model.config, whole.base)
        apart = overlap_penalty(model.plan, whole.steering, orthogonality, scales)
        return penalty(model.plan, whole.steering, state.step) + apart

    extra, extra_grads = jax.value_and_grad(penalties)(state.params)
    grads = jax.tree.map(lambda a, b: a + b.astype(a.dtype), grads, extra_grads)

    with jax.numpy_dtype_promotion("standard"):  # optax relies on it, whatever the caller has set
        tx = optax.with_extra_args_support(tx)
        updates, opt_state = tx.update(grads, state.opt_state, state.params, frozen=frozen)
    params = optax.apply_updates(state.params, updates)
    norm = optax.tree.norm(grads)
    if skip_nonfinite:
        good = jnp.isfinite(value) & jnp.isfinite(extra) & jnp.isfinite(norm)
        old, new = (state.params, state.opt_state), (params, opt_state)
        params, opt_state = jax.tree.map(lambda a, b: jnp.where(good, a, b), new, old)
    tokens = jnp.sum(batch.segments > 0).astype(jnp.float32)
    whole = combine(params, frozen)
    shared = joint_overlap(model.plan, whole.steering, orthogonality, write_scales(model.config, whole.base))
    metrics = Metrics(value, extra, norm, total_weight(batch), tokens, shared)
    return TrainState(params, opt_state, state.step + 1, state.key), metrics
