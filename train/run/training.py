"""From a config to what a training needs: program, state, data, and the batches of its steps."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxsteer.flops import step_flops
from jaxsteer.io import LoadedModel, cache_folder
from jaxsteer.io.load import require_tokenizer
from jaxsteer.io.stored import Place
from jaxsteer.models.attention import causal_share
from jaxsteer.models.config import check_length
from jaxsteer.objectives.objective import Inputs
from jaxsteer.params import Params, combine, partition
from jaxsteer.steering import count_parameters, count_trained, init_steering
from jaxsteer.training import Metrics, TrainState
from jaxsteer.types import PyTree, Steering
from train.base_models import load, resolve_model
from train.config import TrainConfig
from train.data import DataSource, Encoding, Report, StepSource, TokenStore
from train.data.kept import KeptSource
from train.data.records import sampled
from train.data.tokenised import tokenised
from train.display.console import progress
from train.evaluation.evaluator import Evaluator
from train.evaluation.neutral import neutral_examples, read_neutral
from train.run.program import Program, make_program, mesh_of
from train.run.validation import Splits, task_of


@dataclass(frozen=True)
class Training:
    """A run ready to start.

    config     its settings
    loaded     the base model
    program    its static part: model, optimizer, mesh, compiled step
    state      before the first step
    frozen     the leaves that do not train
    data       batches by step
    report     what tokenising the data did
    steps      number of updates
    trainable, total  number of trained parameters, and of all base parameters
    given      what the objective is given besides its inputs
    continues  whether it starts from given steering, rather than from that of the seed
    """

    config: TrainConfig
    loaded: LoadedModel
    program: Program
    state: TrainState
    frozen: Params
    data: StepSource
    report: Report
    steps: int
    trainable: int
    total: int
    given: PyTree = None
    continues: bool = False

    def starting_from(self, steering: Steering) -> Training:
        """The same run with other initial steering, constants included."""
        same = lambda old, new: None if old is None else new
        put = lambda tree: tree._replace(
            steering=jax.tree.map(same, tree.steering, steering, is_leaf=lambda leaf: leaf is None)
        )
        params = put(self.state.params)
        still = [name for name, tree in params.steering.items() if not jax.tree.leaves(tree)]
        trainable = count_parameters(params.base) + count_trained(self.program.model.plan, steering, still)
        state, frozen = self.program.begin(params, self.state.key), self.program.place_frozen(put(self.frozen))
        return replace(self, state=state, frozen=frozen, trainable=trainable, continues=True)

    def step(self, state: TrainState, inputs: Inputs) -> tuple[TrainState, Metrics]:
        """One update. The state given is donated: use the one returned."""
        return self.program.step(state, inputs, self.frozen, self.given)

    def batch(self, step: int) -> Inputs:
        """The inputs of a step (from 0), on the devices; a process makes only the rows that its devices hold."""
        place, rows = self.program.placement, self.config.microbatch
        own = place.own_rows(rows)
        return place.batch(step_batch(self.config, self.data, step, own), rows, own.start)

    def flops(self, supervised: float) -> float:
        """Useful floating-point operations of a step with N supervised tokens; padding counts as tokens."""
        rows, length = self.config.batch_size, self.config.sequence_length
        share = causal_share(length, self.program.attention[0])
        return step_flops(self.program.model, rows, length, round(supervised), causal_share=share).useful

    def params(self, state: TrainState) -> Params:
        """The whole base and steering trees of a state."""
        return combine(state.params, self.frozen)

    def answering(self, state: TrainState) -> Params:
        """What `Evaluator` takes: the state's steering, and its base if that trains."""
        params = self.params(state)
        return params if self.config.train_base else Params(None, params.steering)

    def untouched(self) -> Params:
        """What `Evaluator` takes for the pretrained model: zeros are the identity for every method."""
        return Params(None, jax.tree.map(jnp.zeros_like, self.params(self.state).steering))

    def evaluator(self, splits: Splits) -> Evaluator:
        """Evaluates this run's model on its task.

        Args:
            splits: the task's validation and test examples.
        """
        return make_evaluator(self.config, self.loaded, self.program, splits)


def make_evaluator(config: TrainConfig, loaded: LoadedModel, program: Program, splits: Splits) -> Evaluator:
    """Evaluates a run's model on its task; see `Training.evaluator`."""
    evaluator = Evaluator(
        model=program.model,
        loaded=loaded,
        task=task_of(config),
        placement=program.placement,
        eval_batch_size=config.eval_batch_size,
        limits={"validation": config.validation_examples, "test": config.test_examples},
        metric="validation_loss" if config.select_by == "auto" else config.select_by,
        shown=config.show_answers,
        loss_shape=(config.microbatch, config.sequence_length),
        encoding=encoding_of(config),
    )
    return evaluator.knowing(splits)


def load_base_model(config: TrainConfig, place: Place | None = None) -> LoadedModel:
    """The base model of a run, in the form that its config asks for.

    Args:
        config: the run.
        place: gives the sharding of each leaf of the base tree, see `train.devices.placement`.
    """
    require_tokenizer(resolve_model(config.model), config.tokenizer)
    return load(config.model, config.dtype, place, quantised=config.quantise == "int8", tokenizer=config.tokenizer)


def make_training(
    config: TrainConfig, loaded: LoadedModel, initial: Steering | None = None, data: RunData | None = None
) -> Training:
    """Build a run's parts.

    Args:
        config: the settings.
        loaded: the base model.
        initial: steering to start from, of the config's plan; by default it is initialised from the seed.
        data: the training data, if it is read already.

    Raises:
        ValueError: a plan that does not fit the model, no data, an example longer than a row, or a mesh that cannot
            split the model or the rows.
    """
    source, report = data or read_data(config, loaded)
    steps = config.steps or source.steps(config.epochs)
    program = make_program(config, loaded.config, loaded.base, steps=steps, mesh=mesh_of(config))
    plan, key = program.model.plan, jax.random.key(config.seed)
    steering = init_steering(plan, loaded.config, key, base=loaded.base)

    # The step donates its state: a trained base must not be the caller's own arrays.
    base = jax.tree.map(jnp.copy, loaded.base) if config.train_base else loaded.base
    trained, frozen = partition(Params(base, steering), program.labels)
    trainable = count_parameters(trained.base) + count_trained(plan, steering, config.freeze)
    check_trains(program)
    state, frozen = program.begin(trained, jax.random.fold_in(key, 1)), program.place_frozen(frozen)
    total = count_parameters(loaded.base)
    training = Training(config, loaded, program, state, frozen, source, report, steps, trainable, total)
    return training if initial is None else training.starting_from(initial)


def check_trains(program: Program) -> None:
    """Raise ValueError if nothing trains."""
    if not jax.tree.leaves(program.shapes[0].params):
        raise ValueError("nothing to train: every slot is frozen and train_base is off")


@contextmanager
def tokenising(total: int) -> Iterator[Callable[[int], None]]:
    """A progress bar over `total` examples; gives the callback for how many are done."""
    with progress(total, "Tokenising") as bar:
        yield bar.update


def encoding_of(config: TrainConfig) -> Encoding:
    """How a run turns texts into tokens, whatever their length."""
    return Encoding(chat=config.task.chat, date=config.date, loss_on=config.loss_on)


class RunData(NamedTuple):
    """The training data of a run, and what tokenising it did."""

    source: StepSource
    report: Report

    def ordered_by(self, seed: int) -> RunData:
        """The same examples in another order."""
        assert isinstance(self.source, DataSource | KeptSource)
        return RunData(self.source.ordered_by(seed), self.report)


def read_data(config: TrainConfig, loaded: LoadedModel) -> RunData:
    """Read and tokenise a run's training data. Of the model, only config and tokenizer are used.

    Raises:
        ValueError: no data, an example longer than a row, or no neutral text where it is to be kept.
    """
    positions = loaded.config.max_length if loaded.config.learned_positions else config.sequence_length
    store, report = read_tokens(config, loaded, min(config.sequence_length, positions))
    source = DataSource(store, config.batch_size, config.sequence_length, config.seed, config.pack)
    if not config.keep.weight:
        return RunData(source, report)
    assert config.keep.texts is not None
    check_length(loaded.config, config.keep.length, "--keep.length")
    texts = read_neutral(config.keep.texts)
    neutral = neutral_examples(texts, loaded.require_tokenizer(), config.keep.length)
    return RunData(KeptSource(source, neutral, config.keep.length), report)


def read_tokens(config: TrainConfig, loaded: LoadedModel, limit: int | None) -> tuple[TokenStore, Report]:
    """A run's training examples, tokenised, each of at most `limit` tokens.

    Raises:
        ValueError: no data, or an example over the limit that may not be dropped.
    """
    encoding = replace(encoding_of(config), max_length=limit, on_long=config.on_long)
    recipe, folder = sampled(task_of(config).recipe("train"), config.train_examples), cache_folder() / "tokens"
    return tokenised(recipe, loaded.require_tokenizer(), encoding, folder, tokenising)


def count_steps(config: TrainConfig, loaded: LoadedModel) -> int:
    """The number of updates of a run: as set, or what its epochs come to.

    Raises:
        ValueError: no data, or an example longer than a row.
    """
    return config.steps or read_data(config, loaded).source.steps(config.epochs)


def step_batch(config: TrainConfig, data: StepSource, step: int, own: range | None = None) -> Inputs:
    """The inputs of a step (from 0): numpy [B, T], or [M, B / M, T] with M microbatches.

    Args:
        config: the run.
        data: its examples.
        step: counted from 0.
        own: only these rows of each microbatch.
    """
    rows = config.microbatch
    own = range(rows) if own is None else own
    batch = data.batch(step, [micro * rows + row for micro in range(config.grad_accumulation) for row in own])
    if config.grad_accumulation > 1:
        shape = (config.grad_accumulation, len(own))
        batch = jax.tree.map(lambda field: np.reshape(field, shape + field.shape[1:]), batch)
    return batch


def to_floats(metrics: Metrics) -> dict[str, Any]:
    """Metrics as plain numbers, facts by their names; the overlap as a list with a number per joint layer, left out
    where there is none."""
    fields = jax.device_get(metrics)._asdict()
    fields |= fields.pop("facts")
    values = {name: np.asarray(value).tolist() for name, value in fields.items()}
    return values if values["overlap"] else {k: v for k, v in values.items() if k != "overlap"}
