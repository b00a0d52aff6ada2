"""What the studies of oracles and conversions compare: a base model, a fine-tuning of it, and text."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from jaxsteer.io import LoadedModel, load_steering
from jaxsteer.io.files import write_json
from jaxsteer.models.transformer import Model
from jaxsteer.steering import fold
from jaxsteer.theory.compare import Means, Where, means
from jaxsteer.theory.conversion import measure
from jaxsteer.theory.oracle import Network
from jaxsteer.types import Batch
from train.base_models import load
from train.cli import load_config_file
from train.config import TrainConfig
from train.data import encode, encode_prompts, stack_rows
from train.data.packing import pack
from train.tasks import Split


@dataclass(frozen=True)
class Pair:
    """A base model and what fine-tuning made of it, on one task."""

    loaded: LoadedModel
    config: TrainConfig
    base: Network
    tuned: Network

    def batches(self, split: Split, examples: int, *, rows: int, length: int, answers: bool = True) -> list[Batch]:
        """The first so many examples of a split in packed rows, each once; the last batch is filled up by padding.

        Args:
            answers: with the completions; without, nothing of a label is in them.
        """
        some = self.config.task.load(split)[:examples]
        if not some:
            raise ValueError(f"the task has no {split} examples")
        chat, tokenizer = self.config.task.chat, self.loaded.tokenizer
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
    file = load_steering(path, loaded.config)
    merged, rest, steering = fold(file.plan, loaded.base, file.steering)
    return Pair(loaded, settings, base, Network(Model(loaded.config, rest), merged, steering))


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
