"""Several runs of one config, with different learning rates and seeds, as one `vmap`ped program.

The runs share the frozen base and every matrix product with it: a sweep of K runs compiles once and reads the weights
once per step, where K single runs would read them K times.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax.stages import Compiled

from jaxsteer.io import LoadedModel
from jaxsteer.models.transformer import Model, write_scales
from jaxsteer.objectives import Objective
from jaxsteer.objectives.objective import Inputs
from jaxsteer.optim import Group, OptimConfig, make_optimizer
from jaxsteer.orthogonality import Orthogonality
from jaxsteer.params import Params, combine, param_labels
from jaxsteer.training import Metrics, TrainState, train_step
from jaxsteer.types import Array, PyTree, Steering
from train.config import TrainConfig
from train.devices.placement import SINGLE
from train.run.algorithm import SFT
from train.run.prefetch import Prefetch
from train.run.training import RunData, Training, make_training, read_data, step_batch


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
    data: RunData | None = None,
    initial: Sequence[Steering] | None = None,
    advance: Callable[[int], None] = lambda done: None,
) -> list[Trained]:
    """Train several runs of one config together.

    Args:
        config: what the runs have in common.
        loaded: the base model.
        runs: what differs between them; one if the base itself trains, of which each run would have its own.
        data: the training examples; by default they are read.
        initial: steering to start from, one tree per run; by default it is drawn from the run's seed.
        advance: called after every step with the number of runs that took it.

    Returns:
        The runs, in order.
    """
    assert len(runs) == 1 or not config.train_base
    data = read_data(config, loaded) if data is None else data
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


class _Shared(NamedTuple):
    """What the runs of a sweep have in common, and how they are laid out; hashable.

    many       whether there are several runs
    same_data  whether they share their batches
    """

    model: Model
    objective: Objective
    optim: OptimConfig
    freeze: tuple[str, ...]
    steps: int
    orthogonality: Orthogonality
    many: bool
    same_data: bool


@partial(jax.jit, static_argnums=0, donate_argnums=1)
def _sweep_step(
    shared: _Shared, state: TrainState, batch: Inputs, frozen: Params, factors: Array, given: PyTree
) -> tuple[TrainState, Metrics]:
    """One update of every run -> (state, metrics)."""
    if not shared.many:
        return _step(shared, state, batch, frozen, factors, given)
    axes = (0, None if shared.same_data else 0, Params(None, 0), 0, None)  # type: ignore[arg-type]  # axes
    return jax.vmap(partial(_step, shared), in_axes=axes)(state, batch, frozen, factors, given)


def _step(
    shared: _Shared, state: TrainState, batch: Inputs, frozen: Params, factor: Array, given: PyTree
) -> tuple[TrainState, Metrics]:
    """One update of one run."""
    model, optim = shared.model, shared.optim
    params = combine(state.params, frozen)
    labels = param_labels(params, model.plan, train_base=model.train_base, frozen=shared.freeze)
    peaks: dict[Group, Array] = {group: optim.peak(group) * factor for group in get_args(Group)}
    scales = partial(write_scales, model.config)
    tx = make_optimizer(optim, labels, shared.steps, model.plan, shared.orthogonality, peaks, scales)
    return train_step(
        state, batch, frozen, given, model=model, tx=tx, orthogonality=shared.orthogonality, objective=shared.objective
    )


class SweepProgram:
    """The jitted step of a sweep, and the state that it starts from.

    With several runs, every leaf of state and metrics has a leading axis over the runs. The learning rates are
    arguments of the step, so that programs which differ in them alone, as in a search, share one compiled step.
    """

    def __init__(self, config: TrainConfig, trainings: Sequence[Training], factors: Sequence[float]) -> None:
        first = trainings[0]
        self.many = len(trainings) > 1
        self._config, self._trainings = config, trainings
        # Runs with the same seed see the same batches, which are then not copied for each run.
        same_data = len({training.config.seed for training in trainings}) == 1
        program = first.program
        self._given = SFT.given(first)
        shared = (program.model, config.loss, config.optim, config.freeze, first.steps, program.orthogonality)
        self._shared = _Shared(*shared, self.many, same_data)
        self._factors = jnp.array(factors, jnp.float32)
        if self.many:
            stack = lambda *leaves: jnp.stack(leaves)
            self.state = jax.tree.map(stack, *(training.state for training in trainings))
            steering = jax.tree.map(stack, *(training.frozen.steering for training in trainings))
            self.frozen = Params(first.frozen.base, steering)
        else:
            self._factors = self._factors[0]
            self.state, self.frozen = first.state, first.frozen

    def step(self, state: TrainState, batch: Inputs, frozen: Params) -> tuple[TrainState, Metrics]:
        """One update of every run -> (state, metrics). The state given is donated: use the one returned."""
        return _sweep_step(self._shared, state, batch, frozen, self._factors, self._given)

    def compile(self, state: TrainState, batch: Inputs, frozen: Params) -> Compiled:
        """The compiled step for arguments of these shapes: takes state, batch, frozen, `factors` and `given`."""
        return _sweep_step.lower(self._shared, state, batch, frozen, self._factors, self._given).compile()

    @property
    def given(self) -> PyTree:
        """What the objective is given besides its inputs."""
        return self._given

    @property
    def factors(self) -> Array:
        """What multiplies the learning rates: fp32 [runs], or [] of a single run."""
        return self._factors

    def batch(self, step: int) -> Inputs:
        """The batch of one step: one batch if all runs share it, otherwise a stack with one per run."""
        trainings = self._trainings[:1] if self._shared.same_data else self._trainings
        batches = [step_batch(self._config, training.data, step) for training in trainings]
        if self._shared.same_data:
            return jax.tree.map(jnp.asarray, batches[0])
        return jax.tree.map(lambda *fields: jnp.stack(fields), *batches)

    def of_run(self, k: int, params: Params) -> Params:
        """The leaves of run k: params without the leading axis over the runs."""
        if not self.many:
            return params
        pick: Callable[[PyTree], PyTree] = partial(jax.tree.map, lambda leaf: leaf[k])
        return Params(params.base, pick(params.steering))
