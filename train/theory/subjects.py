"""What studies measure: a base model and the task it was fine-tuned on, a fine-tuning of it, and packed examples.

A fine-tuning is read either as a second network (`read_tuned`), to be compared with the base, or as an update of the
base (`read_update`), to be expanded in.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from jaxsteer.folding import fold_weights
from jaxsteer.io import LoadedModel, SteeringFile, WeightSample, fingerprint, load_config, load_steering, sample_weights
from jaxsteer.io.load import require_tokenizer
from jaxsteer.models.transformer import Model, Network
from jaxsteer.params import Params
from jaxsteer.theory import Means, difference, means, measure, merged, written
from jaxsteer.theory.compare import Where
from jaxsteer.types import Batch, PyTree
from train.base_models import STEERING, check_plan, load, resolve_model, trained_date
from train.cli import load_config_file
from train.config import TrainConfig
from train.data import DataSource, Example, TokenizedExample, encode, encode_prompts, pack, stack_rows
from train.display.console import say
from train.run.training import encoding_of
from train.tasks import Split


@dataclass(frozen=True)
class Base:
    """A pretrained model in float32, and the config of its fine-tuning, which names the task.

    loaded       the model
    config       settings of the fine-tuning, with the day that its chat template printed
    config_file  where they were read from
    examples     those of splits that are read already
    """

    loaded: LoadedModel
    config: TrainConfig
    config_file: str
    examples: Mapping[Split, list[Example]] = field(default_factory=dict)

    @property
    def network(self) -> Network:
        """The model without steering."""
        return Network(Model(config=self.loaded.config), self.loaded.base, {})

    def batches(
        self, split: Split, examples: int, *, batch_size: int, sequence_length: int, answers: bool = True
    ) -> list[Batch]:
        """The first examples of a split, each once, in packed rows; the last batch is filled up with empty rows.

        Args:
            split: of the task.
            examples: their number; all, where the split has fewer.
            batch_size: rows per batch.
            sequence_length: tokens per row.
            answers: include the completions; without, the rows hold nothing of a label.

        Raises:
            ValueError: the split has no examples, or one is longer than a row.
        """
        return _stacked(self._tokens(split, sequence_length, answers, examples), batch_size, sequence_length)

    def full_batches(self, split: Split, batches: int, *, batch_size: int, sequence_length: int) -> list[Batch]:
        """As many leading examples of a split as fit into this number of batches; fewer batches from a small split.

        Raises:
            ValueError: the split has no examples, or one is longer than a row.
        """
        tokens = self._tokens(split, sequence_length)
        rows = batches * batch_size
        rows_of = lambda count: len(pack([len(example) for example in tokens[:count]], sequence_length))
        fitting = bisect_right(range(1, len(tokens) + 1), rows, key=rows_of)
        return _stacked(tokens[:fitting], batch_size, sequence_length)

    def training_batches(self, split: Split, batches: int, *, batch_size: int, sequence_length: int) -> list[Batch]:
        """The first batches of a training run on a split: rows in random order, all of them full.

        Raises:
            ValueError: the split has no examples, or one is longer than a row.
        """
        source = DataSource(self._tokens(split, sequence_length), batch_size, sequence_length)
        return [jax.tree.map(jnp.asarray, source.batch(step)) for step in range(batches)]

    def _tokens(
        self, split: Split, max_length: int, answers: bool = True, count: int | None = None
    ) -> list[TokenizedExample]:
        """The first `count` examples of a split (None = all), tokenised."""
        examples = self.examples[split] if split in self.examples else _examples(self.config, split)
        tokenise = encode if answers else encode_prompts
        encoding = replace(encoding_of(self.config), max_length=max_length, on_long=self.config.on_long)
        return tokenise(examples[:count], self.loaded.require_tokenizer(), encoding)[0]


def read_base(
    config: str, tuned: Sequence[str] = (), plan: Sequence[str] | None = None, splits: Sequence[Split] = ()
) -> Base:
    """Load the base model that a training config names, after everything that can be read without its weights.

    Args:
        config: path or name of the config.
        tuned: fine-tunings that must exist, and be of this model.
        plan: the plan of a training, which must fit the model; () for the config's own, None if nothing is trained.
        splits: of the task, which must have examples.

    Raises:
        ValueError: there is no such config file; the model cannot be loaded; something else is not as it must be.
    """
    settings = load_config_file(config, TrainConfig)
    require_tokenizer(resolve_model(settings.model), settings.tokenizer)
    dates = [_checked(path, settings, config) for path in tuned]
    if plan is not None:
        check_plan(settings.model, plan or settings.plan)
    if settings.date is None:
        settings = replace(settings, date=next((date for date in dates if date is not None), None))
    examples = {split: _examples(settings, split) for split in splits}
    return Base(load(settings.model, "float32", tokenizer=settings.tokenizer), settings, config, examples)


def _examples(config: TrainConfig, split: Split) -> list[Example]:
    examples = config.task.load(split)
    if not examples:
        raise ValueError(f"the task has no {split} examples to measure on")
    return examples


def _checked(path: str, settings: TrainConfig, config: str) -> str | None:
    """Compare a fine-tuning with the model that a config names. Returns the day that it was trained for, if any.

    Raises:
        ValueError: there is no such fine-tuning, or it belongs to another model.
    """
    place, source = _existing(path, config), resolve_model(settings.model)
    if place.is_dir():
        if fingerprint(load_config(place)) != fingerprint(load_config(source)):
            raise ValueError(f"{place}: has another architecture than {settings.model}, which {config} names")
        return trained_date(place)
    file = load_steering(place)
    file.check(load_config(source))
    _of_this_base(file, sample_weights(source), config)
    return file.notes.get("date")


def _of_this_base(file: SteeringFile, sample: WeightSample | None, config: str) -> str:
    """What is to be known of a file and the weights of the model that it is to be compared with.

    Raises:
        ValueError: the weights are those of another model.
    """
    try:
        return file.check_weights(sample)
    except ValueError as error:
        raise ValueError(
            f"{error}. A study compares a fine-tuning with the very model that it began with: name that in {config}"
        ) from None


def read_tuned(path: str, base: Base) -> Network:
    """Load a fine-tuned model; weight methods such as LoRA are merged, other slots stay steering.

    Args:
        path: a steering file (*.safetensors), the folder of a run that has one, or of a fully fine-tuned model.
        base: the model that was fine-tuned.

    Raises:
        ValueError: there is no such fine-tuning, or it belongs to another model.
    """
    config = base.loaded.config
    place = _existing(path, base.config_file)
    if place.is_dir():
        return Network(Model(config=config), load(path, "float32").base, {})
    file = read_steering(str(place), base)
    weights, plan, steering = fold_weights(file.plan, base.loaded.base, file.steering)
    return Network(Model(config=config, plan=plan), weights, steering)


@dataclass(frozen=True)
class Update:
    """A fine-tuning as an update: the tuned model is at θ + δ.

    name   of the run: the folder of the steering file, or of the model
    model  what is static about the model
    at     θ, where the fine-tuning started
    delta  δ, the change of the leaves that it trained
    """

    name: str
    model: Model
    at: Params
    delta: Params


def read_update(path: str, base: Base) -> Update:
    """Load a fine-tuning as an update of its base model.

    LoRA and other weight methods become the change of the weights that merging them makes; steering is switched on by
    what its methods write with (see `jaxsteer.theory.written`); in a fully fine-tuned model every weight changes.

    Args:
        path: a steering file (*.safetensors), the folder of a run that has one, or of a fully fine-tuned model.
        base: the model that was fine-tuned.

    Raises:
        ValueError: there is no such fine-tuning, or it belongs to another model.
    """
    place, weights, plain = _existing(path, base.config_file), base.loaded.base, Model(config=base.loaded.config)
    at = Params(weights, {})
    name = place.parent.name if place.is_file() or place.name == "model" else place.name
    if place.is_dir():
        return Update(name, plain, at, difference(Params(load(path, "float32").base, {}), at))
    file = read_steering(str(place), base)
    if all(slot.method.kind == "weight" for slot in file.plan):
        return Update(name, plain, at, merged(file.plan, weights, file.steering))
    model = Model(config=base.loaded.config, plan=file.plan)
    return Update(name, model, *written(file.plan, weights, file.steering))


def read_steering(path: str, base: Base) -> SteeringFile:
    """Read a steering file of this base model.

    Raises:
        ValueError: the file cannot be read, or belongs to another model.
    """
    file = load_steering(path)
    file.check(base.loaded.config)
    if said := _of_this_base(file, base.loaded.sample, base.config_file):
        say(f"note: {said}")
    return file


def _existing(path: str, config: str) -> Path:
    if not Path(path).exists():
        raise ValueError(
            f"{path}: no such fine-tuning; make it first: python -m train.sft {config} "
            "(`python -m train.theory --help` shows the commands for the fine-tunings of docs/theory.md)"
        )
    return in_run(path)


def in_run(path: str) -> Path:
    """The steering file in a run's folder; any other path as it is."""
    inside = Path(path) / STEERING
    return inside if inside.is_file() else Path(path)


def _stacked(tokens: Sequence[TokenizedExample], batch_size: int, sequence_length: int) -> list[Batch]:
    """Examples in packed rows, and empty rows up to a whole batch."""
    packed = pack([len(example) for example in tokens], sequence_length)
    rows = [[tokens[i] for i in row] for row in packed]
    rows += [[]] * (-len(rows) % batch_size)
    parts = [rows[start : start + batch_size] for start in range(0, len(rows), batch_size)]
    return [jax.tree.map(jnp.asarray, stack_rows(part, sequence_length)) for part in parts]


def count_examples(batches: Sequence[Batch]) -> int:
    """Number of examples in the rows of batches."""
    return sum(int(np.sum(np.max(np.asarray(batch.segments), axis=1))) for batch in batches)


def count_tokens(batches: Sequence[Batch]) -> int:
    """Number of tokens in the rows of batches, without padding."""
    return sum(int(np.sum(np.asarray(batch.segments) > 0)) for batch in batches)


def cast(tree: PyTree, dtype: str) -> PyTree:
    """Every leaf in this dtype; float64 needs `jax.enable_x64`."""
    return jax.tree.map(lambda leaf: jnp.asarray(np.asarray(leaf), dtype), tree)


def judge(tuned: Network, network: Network, batches: Sequence[Batch], where: Where = "answers") -> Means:
    """How a network compares with the tuned one: KL, agreement, accuracy."""
    return means(measure(tuned, network, batches, where))


def with_recovered(results: dict[str, Means]) -> dict[str, dict[str, float]]:
    """Each network's means, and the share of the accuracy gained by fine-tuning that it has ("recovered").

    Args:
        results: means by name, with those of "base" and "fine-tuned".
    """
    base, gain = results["base"].accuracy, results["fine-tuned"].accuracy - results["base"].accuracy
    share = lambda accuracy: (accuracy - base) / gain if gain else float("nan")
    return {name: {**found._asdict(), "recovered": share(found.accuracy)} for name, found in results.items()}


def comparison_rows(results: dict[str, dict[str, float]], heading: str) -> list[dict[str, str]]:
    """Table rows of `with_recovered`'s results (NaN may be text, as in JSON), the networks' names under `heading`."""
    return [
        {
            heading: name,
            "KL, nats": f"{float(found['kl']):.4f}",
            "same answer token": f"{float(found['agreement']):.3f}",
            "accuracy": f"{float(found['accuracy']):.3f}",
            "gain recovered": f"{float(found['recovered']):.2f}",
        }
        for name, found in results.items()
    ]
