"""How a kind of run learns: what its steps are given, and what it measures besides. The loop is the same for all."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from types import TracebackType
from typing import Any, ClassVar, Protocol

from jaxsteer.io import LoadedModel
from jaxsteer.models.transformer import Model, Network
from jaxsteer.objectives.objective import Inputs
from jaxsteer.params import Params
from jaxsteer.training import TrainState
from jaxsteer.types import PyTree
from train.config import TrainConfig
from train.data import Split
from train.run.folder import RunFolder
from train.run.prefetch import Prefetch
from train.run.program import Program
from train.run.training import RunData, Training, read_data
from train.tasks.scoring import Metric

Measure = Callable[[Split, Params], dict[str, float]]
"""(split, what `Evaluator` takes) -> figures by name."""


class Feed(Protocol):
    """What the steps of a run learn from, one after another. A context manager."""

    @property
    def waited(self) -> float:
        """Seconds that the last `take` kept the step waiting for its data."""
        ...

    def take(self, step: int, state: TrainState) -> Inputs:
        """The inputs of a step, placed.

        Args:
            step: from 0; the successor of the last one taken.
            state: before the step.
        """
        ...

    def facts(self) -> dict[str, Any]:
        """What is logged of the inputs taken last, besides the step's metrics."""
        return {}

    def notes(self, done: int) -> Sequence[str]:
        """Lines to print after a step (from 1)."""
        return ()

    def may_save(self, done: int) -> bool:
        """Whether a run can be resumed behind a step (from 1)."""
        return True

    def __enter__(self) -> Feed:
        """The feed itself, at work."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop."""


class Prefetched(Feed):
    """Inputs that depend on the step alone, made in the background.

    Args:
        make: (step) -> its inputs, placed.
        left: the steps that will be taken.
    """

    def __init__(self, make: Callable[[int], Inputs], left: range) -> None:
        self._batches = Prefetch(make, left)

    @property
    def waited(self) -> float:
        """Seconds that the last `take` waited."""
        return self._batches.waited

    def take(self, step: int, state: TrainState) -> Inputs:
        """The inputs of the next step."""
        return self._batches.take(step)

    def __enter__(self) -> Prefetched:
        """Begin with the first step."""
        self._batches.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop, and wait until the inputs being made are made."""
        self._batches.__exit__(kind, error, trace)


@dataclass(frozen=True)
class Algorithm:
    """How a kind of run learns. This one imitates given answers: supervised fine-tuning."""

    metric: ClassVar[Metric | None] = None
    """What `--select-by auto` stands for; None for what fits the task."""

    def read_data(self, config: TrainConfig, model: LoadedModel) -> RunData:
        """Read and tokenise the training data. Of the model, only config and tokenizer may be used.

        Raises:
            ValueError: settings or data that no such run could have.
        """
        return read_data(config, model)

    def refers(self, config: TrainConfig) -> bool:
        """Whether the steering that the run starts from is its reference too, so that a resumed run needs it."""
        return False

    def given(self, training: Training) -> PyTree:
        """Arrays, placed, that the objective is given besides its inputs; None if there are none."""
        return untouched_network(training.config, training.loaded, training.program)

    def given_shapes(self, config: TrainConfig, model: LoadedModel, program: Program) -> PyTree:
        """The shapes of what `given` returns, `jax.ShapeDtypeStruct`s, for a step that is compiled without weights.

        Args:
            config: the run.
            model: its base model without weights.
            program: from shapes.
        """
        return untouched_network(config, model, program)

    def feed(self, training: Training, run: RunFolder, left: range) -> AbstractContextManager[Feed]:
        """What the steps that are left learn from.

        Args:
            training: the run's parts.
            run: its folder, for what is to be kept.
            left: the steps, counted from 0.
        """
        return Prefetched(training.batch, left)

    def measure(self, training: Training) -> Measure:
        """What is measured of a model besides the loss of the reference completions, and its answers."""
        return lambda split, params: {}

    def draw(self, run: RunFolder) -> None:
        """Draw plots of a finished run besides the usual ones, from its files."""


def untouched_network(config: TrainConfig, loaded: LoadedModel, program: Program) -> Network | None:
    """The pretrained model, where predictions on neutral text are to stay what they were."""
    if not config.keep.weight:
        return None
    return Network(Model(loaded.config, (), attention=program.model.attention), loaded.base, {})


SFT = Algorithm()
