"""Distillation: steering trained without labels to predict what another model predicts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxsteer.models.transformer import Network
from jaxsteer.objectives.distillation import kl_at, predictions
from jaxsteer.theory.compare import Where, counted_predictions, means, measure
from jaxsteer.theory.oracle import check_comparable
from jaxsteer.types import Array, Batch, Steering


class Distilled(NamedTuple):
    """The result of distillation.

    network  with its steering trained; the one that it started from, where descent has not lowered the KL
    kl       of each step's batch, nats per prediction, fp32 [steps]
    before   mean KL over the batches before training, nats per prediction
    after    the same after training
    """

    network: Network
    kl: Array
    before: float
    after: float


def distill(
    tuned: Network,
    network: Network,
    batches: Sequence[Batch],
    steps: int,
    lr: float = 1e-4,
    where: Where = "all",
    advance: Callable[[int, float], None] = lambda done, kl: None,
) -> Distilled:
    """Minimise the mean KL(tuned ‖ network) per prediction over the network's steering, by Adam.

    Steering that was fitted to streams with a few very large entries has entries of very different sizes itself, and
    one step size for all would ruin the small ones. So each entry p moves as p₀ + |p₀| q, and Adam trains q: `lr` is
    the share of itself by which an entry moves in a step (an entry counts as at least a hundredth of its layer's root
    mean square; in a layer of zeros entries move by lr itself).

    Args:
        tuned: the target, with any weights or plan.
        network: its steering is trained, from its present values; its weights stay.
        batches: of one shape, used in turn.
        steps: number of updates.
        lr: peak learning rate; linear warm-up over the first eighth of the steps, then cosine decay to 0.
        where: the predictions that count; "all" needs no label.
        advance: callback after every step, with the number of steps done and the KL.

    Raises:
        ValueError: models of different shapes, nothing to train, no batches.
    """
    check_comparable(tuned, network)
    if not batches or not jax.tree.leaves(network.steering) or steps < 1:
        raise ValueError("distillation needs batches, a network with steering, and at least 1 step")
    tx = optax.adam(optax.warmup_cosine_decay_schedule(0.0, lr, min(steps - 1, -(-steps // 8)), steps))
    moves = jax.tree.map(jnp.zeros_like, network.steering)
    state, history = tx.init(moves), []
    for step in range(steps):
        batch = batches[step % len(batches)]
        moves, state, kl = _descend(tuned, network, moves, state, batch, tx=tx, where=where)
        history.append(kl)
        advance(step + 1, float(kl))
    trained = _moved(network, moves)
    mean_kl = lambda network: means(measure(tuned, network, batches[:steps], where)).kl
    before, after = mean_kl(network), mean_kl(trained)
    return Distilled(trained if after < before else network, jnp.stack(history), before, after)


@partial(jax.jit, static_argnames=("tx", "where"))
def _descend(
    tuned: Network,
    network: Network,
    moves: Steering,
    state: optax.OptState,
    batch: Batch,
    *,
    tx: optax.GradientTransformation,
    where: Where,
) -> tuple[Steering, optax.OptState, Array]:
    """One step of Adam on the moves q; also the KL before it."""
    target, counted = predictions(tuned, batch), counted_predictions(batch, where)
    places = jnp.broadcast_to(jnp.arange(counted.shape[1]), counted.shape)

    def mean_kl(moves: Steering) -> Array:
        kl = kl_at(predictions(_moved(network, moves), batch), target, counted, places)
        return jnp.sum(kl) / jnp.maximum(jnp.sum(counted), 1).astype(kl.dtype)

    kl, gradient = jax.value_and_grad(mean_kl)(moves)
    with jax.numpy_dtype_promotion("standard"):
        updates, state = tx.update(gradient, state, moves)
    return optax.apply_updates(moves, updates), state, kl


def _moved(network: Network, moves: Steering) -> Network:
    """The network with steering p₀ + unit · q."""
    steering = jax.tree.map(lambda p, q: p + _units(p) * q, network.steering, moves)
    return Network(network.model, network.base, steering)


def _units(leaf: Array) -> Array:
    """The size of one unit of each entry of a stacked leaf [A, ...], see `distill`."""
    size = jnp.sqrt(jnp.mean(leaf**2, axis=tuple(range(1, leaf.ndim)), keepdims=True))
    return jnp.where(size > 0, jnp.maximum(jnp.abs(leaf), 0.01 * size), 1.0)
