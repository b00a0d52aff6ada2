"""What studies look at: a fine-tuning as an update of its base model, and held-out text."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxsteer.io import LoadedModel, SteeringFile, load_steering
from jaxsteer.io.files import write_json
from jaxsteer.models.transformer import Model, Network
from jaxsteer.params import Params
from jaxsteer.steering import fold_weights
from jaxsteer.theory import difference, merged, written
from jaxsteer.theory.compare import Means, Where, means
from jaxsteer.theory.conversion import measure
from jaxsteer.types import Batch, PyTree
from train.base_models import load
from train.cli import load_config_file
from train.config import TrainConfig
from train.data import DataSource, encode, encode_prompts, stack_rows
from train.data.packing import pack
from train.tasks import Split


@dataclass(frozen=True)
class Subject:
    """A fine-tuning: the model, the point θ where it began, and its update δ; at θ + δ stands the tuned model."""

    name: str
    model: Model
    at: Params
    update: Params


def read_subject(path: str, loaded: LoadedModel, dtype: str = "float32") -> Subject:
    """Read a fine-tuning of a loaded base model.

    LoRA and the like become the update of the weights that merging them makes; steering is switched on by what it
    writes with; of a fully fine-tuned model every weight changes.

    Args:
        path: a steering file (*.safetensors), or a folder of a fine-tuned model.
        loaded: its base.
        dtype: of the weights while they are loaded.

    Raises:
        ValueError: there is no such file, or it belongs to another model.
    """
    place = Path(path)
    if not place.exists():
        raise ValueError(
            f"{path}: no such fine-tuning; `python -m train.theory --help` says how those of docs/theory.md are made"
        )
    name = place.parent.name if place.is_file() or place.name == "model" else place.name
    if place.is_dir():
        tuned = load(path, dtype)
        return Subject(name, Model(loaded.config), *_of_weights(loaded.base, tuned.base))
    file = load_steering(path)
    file.check(loaded.config)
    if all(slot.method.kind == "weight" for slot in file.plan):
        update = merged(file.plan, loaded.base, file.steering)
        return Subject(name, Model(loaded.config), Params(loaded.base, {}), update)
    return Subject(name, Model(loaded.config, file.plan), *written(file.plan, loaded.base, file.steering))


def _of_weights(base: PyTree, tuned: PyTree) -> tuple[Params, Params]:
    at = Params(base, {})
    return at, difference(Params(tuned, {}), at)


def held_out(
    config: TrainConfig, loaded: LoadedModel, *, rows: int, length: int, batches: int, split: str = "test"
) -> Sequence[Batch]:
    """Packed batches of the task's held-out examples, prompts and completions.

    Raises:
        ValueError: no such examples.
    """
    examples = config.task.load(split)  # type: ignore[arg-type]
    if not examples:
        raise ValueError(f"the task has no {split} examples to measure on")
    tokens, _ = encode(
        examples, loaded.require_tokenizer(), chat=config.task.chat, max_length=length, on_long=config.on_long
    )
    source = DataSource(tokens, rows, length)
    return [jax.tree.map(jnp.asarray, source.batch(step)) for step in range(batches)]


def cast(tree: PyTree, dtype: str) -> PyTree:
    """Every leaf in this dtype; float64 needs `jax.enable_x64`."""
    return jax.tree.map(lambda leaf: jnp.asarray(np.asarray(leaf), dtype), tree)


@dataclass(frozen=True)
class Pair:
    """A base model and what fine-tuning made of it, on one task."""

    loaded: LoadedModel
    config: TrainConfig
    base: Network
    tuned: Network
    file: SteeringFile | None = None
    """The steering file that `tuned` was read from, if it is one."""

    def batches(self, split: Split, examples: int, *, rows: int, length: int, answers: bool = True) -> list[Batch]:
        """The first so many examples of a split in packed rows, each once; the last batch is filled up by padding.

        Args:
            answers: with the completions; without, nothing of a label is in them.
        """
        some = self.config.task.load(split)[:examples]
        if not some:
            raise ValueError(f"the task has no {split} examples")
        chat, tokenizer = self.config.task.chat, self.loaded.require_tokenizer()
        if answers:
            tokens, _ = encode(some, tokenizer, chat=chat, max_length=length, on_long=self.config.on_long)
        else:
            tokens, _ = encode_prompts(some, tokenizer, chat=chat)
        packed = pack([len(each) for each in tokens], length)
        packed += [[]] * (-len(packed) % rows)
        filled = [[tokens[i] for i in row] for row in packed]
        return [
            jax.tree.map(jnp.asarray, stack_rows(filled[i : i + rows], length)) for i in range(0, len(filled), rows)
        ]


def read_pair(path: str, config: str) -> Pair:
    """Load a fine-tuning and its base.

    Args:
        path: a steering file (*.safetensors), whose weight methods are merged; or a folder of a fully tuned model.
        config: the config file of the training: names the base and the task.

    Raises:
        ValueError: there is no such fine-tuning, or it is another model's.
    """
    settings = load_config_file(config, TrainConfig)
    place = Path(path)
    if not place.exists():
        raise ValueError(f"{path}: no such fine-tuning; make it first: python -m train.sft {config}")
    loaded = load(settings.model, "float32")
    base = Network(Model(loaded.config), loaded.base, {})
    if place.is_dir():
        return Pair(loaded, settings, base, Network(Model(loaded.config), load(path, "float32").base, {}))
    file = load_steering(path)
    file.check(loaded.config)
    merged, rest, steering = fold_weights(file.plan, loaded.base, file.steering)
    return Pair(loaded, settings, base, Network(Model(loaded.config, rest), merged, steering), file)


def judge(tuned: Network, network: Network, batches: Sequence[Batch], where: Where = "answers") -> Means:
    """A network beside the tuned one: KL, agreement, accuracy."""
    return means(measure(tuned, network, batches, where))


def recovered(found: Means, base: Means, tuned: Means) -> float:
    """The share of the accuracy gained by fine-tuning that a network has."""
    gain = tuned.accuracy - base.accuracy
    return (found.accuracy - base.accuracy) / gain if gain else float("nan")


def counter(update: Callable[..., None]) -> Callable[..., None]:
    """A function that counts its calls into a progress bar."""
    done = 0

    def one(*_: Any) -> None:
        nonlocal done
        done += 1
        update(done)

    return one


def write_result(folder: str | Path, name: str, data: Mapping[str, Any]) -> Path:
    """Write NAME.json into the study's folder, which is made."""
    path = Path(folder) / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, data)
    return path
