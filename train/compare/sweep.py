"""Several runs of one config, with different learning rates and seeds, as one `vmap`ped program.

The runs share the frozen base and every matrix product with it: a sweep of K runs compiles once and reads the weights
once per step, where K single runs would read them K times.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

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
from train.run.prefetch import Prefetch
from train.run.training import Training, make_training, read_data, step_batch


@dataclass(frozen=True)
class Run:
    """What differs between the runs of a sweep."""

    factor: float = 1.0
    """Multiplies the config's learning rates, of both groups."""
    seed: int = 0
    """Random seed for initialisation and data order."""


@dataclass(frozen=True)
class Trained:
    """One finished run.

    losses   [steps]
    overlap  [steps, joint layers], of LoRA and steering
    """

    training: Training
    params: Params
    losses: np.ndarray
    overlap: np.ndarray

    @property
    def diverged(self) -> bool:
        """Whether any loss is not finite."""
        return not bool(np.isfinite(self.losses).all())


def train_runs(
    config: TrainConfig,
    loaded: LoadedModel,
    runs: Sequence[Run],
    *,
    initial: Sequence[Steering] | None = None,
    advance: Callable[[int], None] = lambda done: None,
) -> list[Trained]:
    """Train several runs of one config together, or one after another if the base itself trains.

    Args:
        config: what the runs have in common.
        loaded: the base model.
        runs: what differs between them.
        initial: steering to start from, one tree per run; by default it is drawn from the run's seed.
        advance: called after every step with the number of runs that took it.

    Returns:
        The runs, in order.
    """
    if config.train_base and len(runs) > 1:  # K copies of the base would share no product
        starts = [None] * len(runs) if initial is None else [[steering] for steering in initial]
        return [
            train_runs(config, loaded, [run], initial=start, advance=advance)[0]
            for run, start in zip(runs, starts, strict=True)
        ]
    data = read_data(config, loaded)
    trainings = [
        make_training(replace(config, seed=run.seed, mesh=SINGLE), loaded, data=data.ordered_by(run.seed))
        for run in runs
    ]
    if initial is not None:
        trainings = [training.starting_from(steering) for training, steering in zip(trainings, initial, strict=True)]
    program = SweepProgram(config, trainings, [run.factor for run in runs])
    state, frozen = program.state, program.frozen
    metrics: list[Metrics] = []
    with Prefetch(program.batch, range(trainings[0].steps)) as batches:
        for step in batches.steps:
            state, step_metrics = program.step(state, batches.take(step), frozen)
            metrics.append(jax.device_get(step_metrics))
            advance(len(runs))
    losses, overlap = np.stack([m.loss for m in metrics]), np.stack([m.overlap for m in metrics])
    return [
        Trained(
            training,
            combine(program.of_run(k, state.params), program.of_run(k, frozen)),
            losses[:, k] if program.many else losses,
            overlap[:, k] if program.many else overlap,
        )
        for k, training in enumerate(trainings)
    ]


class SweepProgram:
    """The jitted step of a sweep, and the state that it starts from.

    step is (state, batch, frozen) -> (state, metrics). With several runs, every leaf of state and metrics has a leading
    axis over the runs.
    """

    def __init__(self, config: TrainConfig, trainings: Sequence[Training], factors: Sequence[float]) -> None:
        first = trainings[0]
        self.many = len(trainings) > 1
        self._config, self._trainings = config, trainings
        # Runs with the same seed see the same batches, which are then not copied for each run.
        self._same_data = len({training.data.seed for training in trainings}) == 1
        model, orthogonality = first.program.model, first.program.orthogonality
        params = first.params(first.state)
        labels = param_labels(params, model.plan, train_base=config.train_base, frozen=config.freeze)

        def step(state: TrainState, batch: Batch, frozen: Params, factor: Array) -> tuple[TrainState, Metrics]:
            peaks = {group: config.optim.peak(group) * factor for group in ("activations", "weights")}
            tx = make_optimizer(
                config.optim,
                labels,
                first.steps,
                model.plan,
                orthogonality,
                peaks,  # type: ignore[arg-type]
                partial(write_scales, model.config),
            )
            return train_step(state, batch, frozen, model=model, tx=tx, orthogonality=orthogonality)

        factor = jnp.array(factors, jnp.float32)
        if self.many:
            axes = (0, None if self._same_data else 0, Params(None, 0), 0)  # type: ignore[arg-type]  # axes
            sweep_step = jax.vmap(step, in_axes=axes)
            stack = lambda *leaves: jnp.stack(leaves)
            self.state = jax.tree.map(stack, *(training.state for training in trainings))
            steering = jax.tree.map(stack, *(training.frozen.steering for training in trainings))
            self.frozen = Params(first.frozen.base, steering)
        else:
            sweep_step, factor = step, factor[0]
            self.state, self.frozen = first.state, first.frozen
        self.step = jax.jit(lambda state, batch, frozen: sweep_step(state, batch, frozen, factor), donate_argnums=0)

    def batch(self, step: int) -> Batch:
        """The batch of one step: one batch if all runs share it, otherwise a stack with one per run."""
        trainings = self._trainings[:1] if self._same_data else self._trainings
        batches = [step_batch(self._config, training.data, step) for training in trainings]
        if self._same_data:
            return jax.tree.map(jnp.asarray, batches[0])
        return jax.tree.map(lambda *fields: jnp.stack(fields), *batches)

    def of_run(self, k: int, params: Params) -> Params:
        """The leaves of run k: params without the leading axis over the runs."""
        if not self.many:
            return params
        pick: Callable[[PyTree], PyTree] = partial(jax.tree.map, lambda leaf: leaf[k])
        return Params(params.base, pick(params.steering))
