"""One training step as a pure function: accumulate gradients of the trained leaves, add the penalties, update."""

from __future__ import annotations

from functools import partial
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp
import optax

from jaxsteer.models.transformer import Model, write_scales
from jaxsteer.objective import supervised_loss, total_weight
from jaxsteer.orthogonality import Orthogonality, joint_overlap, overlap_penalty
from jaxsteer.params import Params, combine
from jaxsteer.steering import penalty
from jaxsteer.types import Array, Batch, PyTree, Steering

UNCONSTRAINED = Orthogonality("none")


class TrainState(NamedTuple):
    """What a step changes.

    params     the trained leaves, None elsewhere (see `jaxsteer.params.partition`)
    opt_state  the optimizer's state
    step       number of steps done, int32 []
    key        the run's key; a step uses it folded with `step`
    """

    params: Params
    opt_state: optax.OptState
    step: Array
    key: Array


class Metrics(NamedTuple):
    """Metrics of one step; fp32 scalars, except `overlap`.

    loss        mean cross-entropy per supervised token, nats
    penalty     sum of the penalties
    grad_norm   global norm of the gradient, before clipping
    supervised  Σ |weight| of the batch's targets
    tokens      tokens of the batch that are not padding
    overlap     Ω of LoRA and steering after the update, fp32 [n], for each layer that has both
    """

    loss: Array
    penalty: Array
    grad_norm: Array
    supervised: Array
    tokens: Array
    overlap: Array


class LossFunction(Protocol):
    """A loss summed over a batch's supervised tokens, such as `jaxsteer.objective.supervised_loss`."""

    def __call__(
        self, model: Model, base: PyTree, steering: Steering, batch: Batch, key: Array, /, *, train: bool
    ) -> Array:
        """The scalar loss of a batch [B, T]."""
        ...


def init_state(params: Params, tx: optax.GradientTransformation, key: Array) -> TrainState:
    """The state before the first step.

    Args:
        params: the trained leaves only, see `jaxsteer.params.partition`.
        tx: the optimizer.
        key: the run's key.
    """
    return TrainState(params, tx.init(params), jnp.zeros((), jnp.int32), key)


def make_train_step(
    model: Model,
    tx: optax.GradientTransformation,
    *,
    orthogonality: Orthogonality = UNCONSTRAINED,
    skip_nonfinite: bool = False,
    loss: LossFunction = supervised_loss,
    out_shardings: PyTree = None,
) -> jax.stages.Wrapped:
    """Compile `train_step`: the result maps (state, batch, frozen) to (state, metrics).

    The state that is passed in is donated: its buffers are reused for the new one, so keep only what the step returns.

    Args:
        model: as for `train_step`; so are `tx`, `orthogonality`, `skip_nonfinite` and `loss`.
        out_shardings: shardings of (state, metrics) on a mesh, as for `jax.jit`; by default the compiler's choice.
    """
    step = partial(
        train_step, model=model, tx=tx, orthogonality=orthogonality, skip_nonfinite=skip_nonfinite, loss=loss
    )
    return jax.jit(step, donate_argnums=0, out_shardings=out_shardings)


def train_step(
    state: TrainState,
    batch: Batch,
    frozen: Params,
    *,
    model: Model,
    tx: optax.GradientTransformation,
    orthogonality: Orthogonality = UNCONSTRAINED,
    skip_nonfinite: bool = False,
    loss: LossFunction = supervised_loss,
) -> tuple[TrainState, Metrics]:
    """Update the trained leaves on one batch: L = Σ weight · nll / Σ |weight| + penalties.

    Only `state.params` is differentiated, so a frozen base costs no weight gradients and no optimizer state. The
    divisor is the weight of the whole batch, so accumulated microbatches give the gradient of one large batch.

    Args:
        state: from `init_state`.
        batch: fields [B, T], or [M, B, T] to accumulate gradients over M microbatches.
        frozen: the leaves that do not train.
        model: static.
        tx: the optimizer.
        orthogonality: resolved for the plan (`Orthogonality.resolve`); its penalty is added to the loss.
        skip_nonfinite: if the loss, a penalty or the gradient norm is not finite, leave parameters and optimizer state
            (and with it the schedules) unchanged, bit for bit; only `step` advances.
        loss: the summed loss of a microbatch.

    Returns:
        The new state, and the step's metrics.
    """
    if batch.tokens.ndim == 2:
        batch = jax.tree.map(lambda field: field[None], batch)
    total = total_weight(batch)
    value, grads = _accumulate(state, batch, frozen, jnp.maximum(total, 1e-6), model, loss)
    extra, extra_grads = jax.value_and_grad(_penalties)(state.params, frozen, state.step, model, orthogonality)
    grads = jax.tree.map(lambda a, b: a + b.astype(a.dtype), grads, extra_grads)

    with jax.numpy_dtype_promotion("standard"):  # optax relies on it, whatever the caller has set
        updates, opt_state = optax.with_extra_args_support(tx).update(
            grads, state.opt_state, state.params, frozen=frozen
        )
    params = optax.apply_updates(state.params, updates)
    norm = optax.tree.norm(grads)
    if skip_nonfinite:
        finite = jnp.isfinite(value) & jnp.isfinite(extra) & jnp.isfinite(norm)
        keep = lambda new, old: jnp.where(finite, new, old)
        params, opt_state = jax.tree.map(keep, (params, opt_state), (state.params, state.opt_state))
    whole = combine(params, frozen)
    metrics = Metrics(
        loss=value,
        penalty=extra,
        grad_norm=norm,
        supervised=total,
        tokens=jnp.sum(batch.segments > 0).astype(jnp.float32),
        overlap=joint_overlap(model.plan, whole.steering, orthogonality, write_scales(model.config, whole.base)),
    )
    return TrainState(params, opt_state, state.step + 1, state.key), metrics


def _accumulate(
    state: TrainState, batch: Batch, frozen: Params, divisor: Array, model: Model, loss: LossFunction
) -> tuple[Array, Params]:
    """The loss over `divisor` and its gradients, summed over the microbatches of a batch [M, B, T]."""
    key = jax.random.fold_in(state.key, state.step)

    def share_of_loss(params: Params, micro: Batch, index: Array) -> Array:
        whole = combine(params, frozen)
        value = loss(model, whole.base, whole.steering, micro, jax.random.fold_in(key, index), train=True)
        return value / divisor.astype(value.dtype)

    def accumulate(sums: tuple[Array, Params], micro: tuple[Batch, Array]) -> tuple[tuple[Array, Params], None]:
        value, grads = jax.value_and_grad(share_of_loss)(state.params, *micro)
        return jax.tree.map(jnp.add, sums, (value.astype(jnp.float32), grads)), None

    zeros = (jnp.zeros((), jnp.float32), jax.tree.map(jnp.zeros_like, state.params))
    microbatches = (batch, jnp.arange(batch.tokens.shape[0]))
    if batch.tokens.shape[0] == 1:  # no loop around a single one
        return accumulate(zeros, jax.tree.map(lambda x: x[0], microbatches))[0]
    return jax.lax.scan(accumulate, zeros, microbatches)[0]


def _penalties(params: Params, frozen: Params, step: Array, model: Model, orthogonality: Orthogonality) -> Array:
    """The methods' own penalties, and that on the overlap of LoRA and steering. Scalar fp32."""
    whole = combine(params, frozen)
    scales = write_scales(model.config, whole.base)
    apart = overlap_penalty(model.plan, whole.steering, orthogonality, scales)
    return penalty(model.plan, whole.steering, step) + apart
