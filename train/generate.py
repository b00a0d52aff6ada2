"""Answer prompts with a steered model: `python -m train.generate runs/quickstart/steering.safetensors '[MAX 2 7 ]'`."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import tyro

from jaxsteer.inference.generate import Sampling
from jaxsteer.models.transformer import Model
from jaxsteer.params import Params
from jaxsteer.types import Plan, Steering
from train.base_models import load_steered, steered
from train.cli import run_main
from train.data import Example
from train.devices.machine import enable_compilation_cache
from train.devices.placement import MeshConfig, place_on
from train.devices.processes import DistributedConfig, is_first, join
from train.evaluation.evaluator import Evaluator
from train.tasks import Split
from train.tasks.scoring import Rule


@dataclass(frozen=True)
class GenerateConfig:
    """Continue prompts with a base model and, optionally, a steering file."""

    steering: Annotated[str, tyro.conf.Positional]
    """A steering file (*.safetensors), or "none" for the pretrained model."""
    prompts: Annotated[tuple[str, ...], tyro.conf.Positional] = ()
    """Prompts; without any, one per line is read from standard input."""
    model: str | None = None
    """Base model; by default the one named in the steering file."""
    raw: bool = False
    """Use the prompts as they are, without the template that the steering was trained with."""
    chat: bool | None = None
    """Apply the model's chat template; by default as in training."""
    compare: bool = False
    """Also print the unsteered model's answer."""
    max_new_tokens: int | None = None
    """Maximum number of tokens to generate; by default as in training, else 64."""
    temperature: float = 0.0
    """Sampling temperature; 0: greedy decoding."""
    top_k: int = 0
    """Sample from the k most likely tokens only; 0: all."""
    top_p: float = 1.0
    """Sample from the smallest set of most likely tokens whose probabilities add up to this."""
    seed: int = 0
    """Random seed for sampling."""
    mesh: MeshConfig = field(default_factory=MeshConfig)
    """How weights and prompts are sharded over devices."""
    distributed: DistributedConfig = field(default_factory=DistributedConfig)
    """How the processes of a multi-host run find each other."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Data type of the weights and the compute; auto: float32 on CPU, bfloat16 on accelerators."""


@dataclass(frozen=True)
class OpenTask:
    """Questions without a known answer: how they are asked, and how long an answer may be."""

    template: str
    chat: bool
    max_new_tokens: int
    rule: Rule = "exact"

    def load(self, split: Split) -> list[Example]:
        """An open task has no examples of its own."""
        return []

    def examples(self, texts: Sequence[str]) -> list[Example]:
        """The questions as examples."""
        asked = [self.template.replace("{prompt}", text) for text in texts]
        return [Example.of(prompt, None, f"prompt {number}") for number, prompt in enumerate(asked, 1)]


def open_task(config: GenerateConfig, notes: Mapping[str, Any]) -> OpenTask:
    """How to ask: as typed, else as the steering file's notes say."""
    return OpenTask(
        template="{prompt}" if config.raw else notes.get("template", "{prompt}"),
        chat=notes.get("chat", False) if config.chat is None else config.chat,
        max_new_tokens=notes.get("max_new_tokens", 64) if config.max_new_tokens is None else config.max_new_tokens,
    )


def main() -> None:
    """Print each prompt with its answer."""
    config = tyro.cli(GenerateConfig, prog="python -m train.generate", description=__doc__)
    join(config.distributed)
    enable_compilation_cache()
    if not 0 <= config.seed < 1 << 32:
        raise ValueError(f"--seed must be from 0 to 2**32 - 1, got {config.seed}")
    sampling = Sampling(config.temperature, config.top_k, config.top_p)
    texts = config.prompts or tuple(line.rstrip("\n") for line in sys.stdin if line.strip())
    if not texts:
        raise ValueError("no prompts: give some, or one per line on standard input")
    place = place_on(config.mesh, len(texts))
    loaded, file = load_steered(config.steering, config.model, config.dtype, place.base)
    task = open_task(config, file.notes if file else {})

    def answer(plan: Plan, steering: Steering) -> list[str]:
        evaluator = Evaluator(
            model=Model(loaded.config, plan),
            loaded=loaded,
            task=task,
            placement=place,
            sampling=sampling,
            seed=config.seed,
        )
        return [each.output for each in evaluator.answer(task.examples(texts), Params(None, steering))]

    steered_outputs = answer(*steered(file))
    base_outputs = answer((), {}) if config.compare and file else []
    if is_first():
        _print_answers(texts, steered_outputs, base_outputs)


def _print_answers(texts: Sequence[str], outputs: Sequence[str], base_outputs: Sequence[str]) -> None:
    for i, text in enumerate(texts):
        if base_outputs:
            print(f"{text}\n  base     {base_outputs[i]!r}\n  steered  {outputs[i]!r}")
        elif len(texts) == 1:
            print(outputs[i])
        else:
            print(f"{text}\n  {outputs[i]}")


if __name__ == "__main__":
    run_main(main)
