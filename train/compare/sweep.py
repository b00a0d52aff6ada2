"""Several runs of one config, with other learning rates and seeds, as one `vmap`ped program.

The runs share the frozen base and every matrix product with it, so a sweep of K runs reads the weights once where K
runs would read them K times, and compiles once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxsteer.io import LoadedModel
from jaxsteer.models.transformer import write_scales
from jaxsteer.optim import make_optimizer
from jaxsteer.params import Params, combine, param_labels
from jaxsteer.training import Metrics, TrainState, train_step
from jaxsteer.types import Array, Batch, PyTree, Steering
from train.config import TrainConfig
from train.devices.placement import SINGLE
from train.run.training import Training, make_training, step_batch


@dataclass(frozen=True)
class Run:
    """What sets a run of a sweep apart from the others."""

    factor: float = 1.0
    """On the learning rates of the config, both groups'."""
    seed: int = 0
    """Of the initialisation and the order of the data."""


@dataclass(frozen=True)
class Trained:
    """One finished run. losses [steps]; overlap [steps, joint layers]; a diverged run stopped having finite losses."""

    training: Training
    params: Params
    losses: np.ndarray
    overlap: np.ndarray

    @property
    def diverged(self) -> bool:
        """Whether a loss was not finite."""
        return not bool(np.isfinite(self.losses).all())


def train_runs(
    config: TrainConfig,
    loaded: LoadedModel,
    runs: Sequence[Run],
    *,
    initial: Sequence[Steering] | None = None,
    advance: Callable[[int], None] = lambda done: None,
) -> list[Trained]:
    """Train several runs of one config at the same time, or one after another where the base itself trains.

    Args:
        config: what they have in common.
        loaded: the base model.
        runs: what they do not.
        initial: steering to start from, one for each run; by default it is drawn from the run's seed.
        advance: hears the number of run-steps (runs × steps) just done.

    Returns:
        The runs, in order.
    """
    if config.train_base and len(runs) > 1:  # K copies of the base would share no product
        starts = [None] * len(runs) if initial is None else [[one] for one in initial]
        return [
            train_runs(config, loaded, [run], initial=start, advance=advance)[0]
            for run, start in zip(runs, starts, strict=True)
        ]
    trainings = [make_training(replace(config, seed=run.seed, mesh=SINGLE), loaded) for run in runs]
    if initial is not None:
        trainings = [each.starting_from(steering) for each, steering in zip(trainings, initial, strict=True)]
    program = SweepProgram(config, trainings, [run.factor for run in runs])
    state, frozen = program.state, program.frozen
    metrics: list[Metrics] = []
    for step in range(trainings[0].steps):
        state, found = program.step(state, program.batch(step), frozen)
        metrics.append(jax.device_get(found))
        advance(len(runs))
    losses, shared = np.stack([m.loss for m in metrics]), np.stack([m.overlap for m in metrics])
    return [
        Trained(
            training,
            combine(program.one(state.params, k), program.one(frozen, k)),
            losses[:, k] if program.many else losses,
            shared[:, k] if program.many else shared,
        )
        for k, training in enumerate(trainings)
    ]


class SweepProgram:
    """The compiled step of a sweep and what it starts from.

    step is (state, batch, frozen) -> (state, metrics), each leaf of state and metrics with a leading axis of the runs;
    without one where there is a single run.
    """

    def __init__(self, config: TrainConfig, trainings: Sequence[Training], factors: Sequence[float]) -> None:
        first = trainings[0]
        self.many = len(trainings) > 1
        self._config, self._trainings = config, trainings
        # Runs of one seed see the same batches; a batch that all share is not copied for each of them.
        self._same_data = len({training.data.seed for training in trainings}) == 1
        labels = param_labels(
            first.params(first.state), first.model.plan, train_base=config.train_base, frozen=config.freeze
        )

        def step(state: TrainState, batch: Batch, frozen: Params, factor: Array) -> tuple[TrainState, Metrics]:
            peaks = {group: config.optim.peak(group) * factor for group in ("activations", "weights")}
            tx = make_optimizer(
                config.optim,
                labels,
                first.steps,
                first.model.plan,
                first.orthogonality,
                peaks,  # type: ignore[arg-type]
                partial(write_scales, first.model.config),
            )
            return train_step(state, batch, frozen, model=first.model, tx=tx, orthogonality=first.orthogonality)

        rates = jnp.array(factors, jnp.float32)
        if self.many:
            axes = (0, None if self._same_data else 0, Params(None, 0), 0)  # type: ignore[arg-type]  # axes
            whole = jax.vmap(step, in_axes=axes)
            stack = lambda *leaves: jnp.stack(leaves)
            self.state = jax.tree.map(stack, *(training.state for training in trainings))
            steering = jax.tree.map(stack, *(training.frozen.steering for training in trainings))
            self.frozen = Params(first.frozen.base, steering)
        else:
            whole, rates = step, rates[0]
            self.state, self.frozen = first.state, first.frozen
        self.step: Any = jax.jit(lambda state, batch, frozen: whole(state, batch, frozen, rates), donate_argnums=0)

    def batch(self, step: int) -> Batch:
        """The batches of one step: one where all runs share it, else stacked."""
        own = self._trainings[:1] if self._same_data else self._trainings
        batches = [step_batch(self._config, training.data, step) for training in own]
        if self._same_data:
            return jax.tree.map(jnp.asarray, batches[0])
        return jax.tree.map(lambda *fields: jnp.stack(fields), *batches)

    def one(self, params: Params, k: int) -> Params:
        """The leaves of run k."""
        if not self.many:
            return params
        pick: Callable[[PyTree], PyTree] = partial(jax.tree.map, lambda leaf: leaf[k])
        return Params(params.base, pick(params.steering))
