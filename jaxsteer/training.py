"""One training step as a pure function: accumulate gradients of the trained leaves, add the penalties, update."""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxsteer.models.transformer import Model, write_scales
from jaxsteer.objectives.objective import Inputs, Mean, Objective, Summed, batch_of
from jaxsteer.objectives.supervised import SUPERVISED
from jaxsteer.objectives.tokens import total_weight
from jaxsteer.orthogonality import Orthogonality, joint_overlap, overlap_penalty
from jaxsteer.params import Params, combine
from jaxsteer.steering import penalty
from jaxsteer.types import Array, PyTree

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
    """Metrics of one step; fp32 scalars, except `overlap` and `facts`.

    loss        of the objective; for supervised fine-tuning the mean cross-entropy per supervised token, nats
    penalty     sum of the penalties
    grad_norm   global norm of the gradient, before clipping
    supervised  Σ |weight| of the batch's targets
    tokens      tokens of the batch that are not padding
    overlap     Ω of LoRA and steering after the update, fp32 [n], for each layer that has both
    facts       what the objective logs besides, by name
    """

    loss: Array
    penalty: Array
    grad_norm: Array
    supervised: Array
    tokens: Array
    overlap: Array
    facts: dict[str, Array]


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
    objective: Objective = SUPERVISED,
    out_shardings: PyTree = None,
) -> jax.stages.Wrapped:
    """Compile `train_step`: the result maps (state, inputs, frozen, given) to (state, metrics).

    The state that is passed in is donated: its buffers are reused for the new one, so keep only what the step returns.

    Args:
        model: as for `train_step`; so are `tx`, `orthogonality`, `skip_nonfinite` and `objective`.
        out_shardings: shardings of (state, metrics) on a mesh, as for `jax.jit`; by default the compiler's choice.
    """
    step = partial(
        train_step, model=model, tx=tx, orthogonality=orthogonality, skip_nonfinite=skip_nonfinite, objective=objective
    )
    return jax.jit(step, donate_argnums=0, out_shardings=out_shardings)


def train_step(
    state: TrainState,
    inputs: Inputs,
    frozen: Params,
    given: PyTree = None,
    *,
    model: Model,
    tx: optax.GradientTransformation,
    orthogonality: Orthogonality = UNCONSTRAINED,
    skip_nonfinite: bool = False,
    objective: Objective = SUPERVISED,
) -> tuple[TrainState, Metrics]:
    """Update the trained leaves on one batch: L = Σ loss of a microbatch / total + penalties.

    Only `state.params` is differentiated, so a frozen base costs no weight gradients and no optimizer state. The
    divisor is that of the whole batch, so accumulated microbatches give the gradient of one large batch.

    Args:
        state: from `init_state`.
        inputs: of the objective, a `Batch` for supervised fine-tuning: leaves [B, T], or [M, B, T] to accumulate
            gradients over M microbatches.
        frozen: the leaves that do not train.
        given: what the objective is given besides, the same in all steps.
        model: static.
        tx: the optimizer.
        orthogonality: resolved for the plan (`Orthogonality.resolve`); its penalty is added to the loss.
        skip_nonfinite: if the loss, a penalty or the gradient norm is not finite, leave parameters and optimizer state
            (and with it the schedules) unchanged, bit for bit; only `step` advances.
        objective: the loss.

    Returns:
        The new state, and the step's metrics.
    """
    if batch_of(inputs).tokens.ndim == 2:
        inputs = jax.tree.map(lambda field: field[None], inputs)
    learning = Learning(model, objective, frozen, given)
    inputs = learning.prepared(state.params, inputs)
    total = objective.total(inputs)
    sums, grads = _accumulate(state, inputs, jnp.maximum(total, 1e-6), learning)
    extra, extra_grads = jax.value_and_grad(_penalties)(state.params, frozen, state.step, model, orthogonality)
    grads = jax.tree.map(lambda a, b: a + b.astype(a.dtype), grads, extra_grads)

    with jax.numpy_dtype_promotion("standard"):  # optax relies on it, whatever the caller has set
        updates, opt_state = optax.with_extra_args_support(tx).update(
            grads, state.opt_state, state.params, frozen=frozen
        )
    params = optax.apply_updates(state.params, updates)
    norm = optax.tree.norm(grads)
    if skip_nonfinite:
        finite = jnp.isfinite(sums.loss) & jnp.isfinite(extra) & jnp.isfinite(norm)
        keep = lambda new, old: jnp.where(finite, new, old)
        params, opt_state = jax.tree.map(keep, (params, opt_state), (state.params, state.opt_state))
    whole, batch = combine(params, frozen), batch_of(inputs)
    metrics = Metrics(
        loss=sums.loss,
        penalty=extra,
        grad_norm=norm,
        supervised=total_weight(batch),
        tokens=jnp.sum(batch.segments > 0).astype(jnp.float32),
        overlap=joint_overlap(model.plan, whole.steering, orthogonality, write_scales(model.config, whole.base)),
        facts={name: fact.total / jnp.maximum(fact.number, 1e-6) for name, fact in sums.facts.items()},
    )
    return TrainState(params, opt_state, state.step + 1, state.key), metrics


class Learning(NamedTuple):
    """What an objective is computed with, besides the trained leaves, the inputs and a key."""

    model: Model
    objective: Objective
    frozen: Params
    given: PyTree

    def prepared(self, params: Params, inputs: Inputs) -> Inputs:
        """The inputs [M, B, ...] with what depends on the whole batch."""
        whole = jax.lax.stop_gradient(combine(params, self.frozen))
        return self.objective.prepare(self.model, whole.base, whole.steering, inputs, self.given)

    def summed(self, params: Params, micro: Inputs, key: Array) -> Summed:
        """The loss of a microbatch."""
        whole = combine(params, self.frozen)
        return self.objective(self.model, whole.base, whole.steering, micro, self.given, key, train=True)


def _accumulate(state: TrainState, inputs: Inputs, divisor: Array, learning: Learning) -> tuple[Summed, Params]:
    """The loss over `divisor`, the summed facts, and the gradients, over the microbatches of inputs [M, B, ...]."""
    key = jax.random.fold_in(state.key, state.step)

    def share_of_loss(params: Params, micro: Inputs, index: Array) -> tuple[Array, dict[str, Mean]]:
        loss, facts = learning.summed(params, micro, jax.random.fold_in(key, index))
        as_float = partial(jax.tree.map, lambda value: jnp.asarray(value, jnp.float32))
        return loss / divisor.astype(loss.dtype), as_float(facts)

    def one(micro: tuple[Inputs, Array]) -> tuple[Summed, Params]:
        (value, facts), grads = jax.value_and_grad(share_of_loss, has_aux=True)(state.params, *micro)
        return Summed(value.astype(jnp.float32), facts), grads

    microbatches = (inputs, jnp.arange(batch_of(inputs).tokens.shape[0]))
    first = jax.tree.map(lambda x: x[0], microbatches)
    if batch_of(inputs).tokens.shape[0] == 1:  # no loop around a single one
        return one(first)
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), jax.eval_shape(one, first))
    add = lambda sums, micro: (jax.tree.map(jnp.add, sums, one(micro)), None)
    return jax.lax.scan(add, zeros, microbatches)[0]


def _penalties(params: Params, frozen: Params, step: Array, model: Model, orthogonality: Orthogonality) -> Array:
    """The methods' own penalties, and that on the overlap of LoRA and steering. Scalar fp32."""
    whole = combine(params, frozen)
    scales = write_scales(model.config, whole.base)
    apart = overlap_penalty(model.plan, whole.steering, orthogonality, scales)
    return penalty(model.plan, whole.steering, step) + apart
