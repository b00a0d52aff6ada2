"""What studies look at: a fine-tuning as an update of its base model, and held-out text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from jaxsteer.io import LoadedModel, load_steering
from jaxsteer.models.transformer import Model
from jaxsteer.optim import Params
from jaxsteer.theory import difference, merged, written
from jaxsteer.types import Batch, PyTree
from train.base_models import load
from train.config import TrainConfig
from train.data import DataSource, encode


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
    file = load_steering(path, loaded.config)
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
    tokens, _ = encode(examples, loaded.tokenizer, chat=config.task.chat, max_length=length, on_long=config.on_long)
    source = DataSource(tokens, rows, length)
    return [jax.tree.map(jnp.asarray, source.batch(step)) for step in range(batches)]


def cast(tree: PyTree, dtype: str) -> PyTree:
    """Every leaf in this dtype; float64 needs `jax.enable_x64`."""
    return jax.tree.map(lambda leaf: jnp.asarray(np.asarray(leaf), dtype), tree)
