"""Answer prompts with a steered model: `python -m train.generate runs/quickstart/steering.safetensors '[MAX 2 7 ]'`."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import jax
import tyro

from jaxsteer.inference.generate import Sampling
from jaxsteer.models.transformer import Model
from jaxsteer.types import Plan, Steering
from train.base_models import load_steered, steered
from train.cli import run_main
from train.data import Example
from train.devices.machine import enable_compilation_cache
from train.devices.placement import MeshConfig, place_on
from train.devices.processes import DistributedConfig, is_first, join
from train.evaluation.answers import decode, make_prompts
from train.tasks.scoring import Rule


@dataclass(frozen=True)
class GenerateConfig:
    """Continue prompts with a base model and, optionally, a steering file."""

    steering: Annotated[str, tyro.conf.Positional]
    """A steering file (*.safetensors), or "none" for the plain model."""
    prompts: Annotated[tuple[str, ...], tyro.conf.Positional] = ()
    """Prompts; without any, one a line is read from standard input."""
    model: str | None = None
    """The base model; by default the one named in the steering file."""
    raw: bool = False
    """Use the prompts as they are, without the template that the steering was trained with."""
    chat: bool | None = None
    """Ask through the model's chat template; by default as the steering was trained."""
    compare: bool = False
    """Print the unsteered model's answer too."""
    max_new_tokens: int | None = None
    """Tokens to generate; by default as the steering was trained, else 64."""
    temperature: float = 0.0
    """0 = the most likely token every time."""
    top_k: int = 0
    """Draw from the k most likely tokens only; 0 = all."""
    top_p: float = 1.0
    """Draw from the most likely tokens that have this probability together."""
    seed: int = 0
    """Of the drawing."""
    mesh: MeshConfig = field(default_factory=MeshConfig)
    """How the weights (and prompts, by their number) are spread over several devices."""
    distributed: DistributedConfig = field(default_factory=DistributedConfig)
    """How processes on several hosts find each other."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of the weights and the compute: auto = float32 on CPU, bfloat16 on accelerators."""


@dataclass(frozen=True)
class Ask:
    """How prompts are put to a model, and how much it may say."""

    chat: bool
    max_new_tokens: int
    rule: Rule = "exact"


def main() -> None:
    """Print each prompt with its answer."""
    config = tyro.cli(GenerateConfig, prog="python -m train.generate", description=__doc__)
    join(config.distributed)
    enable_compilation_cache()
    sampling = Sampling(config.temperature, config.top_k, config.top_p)
    texts = config.prompts or tuple(line.rstrip("\n") for line in sys.stdin if line.strip())
    if not texts:
        raise ValueError("no prompts: give some, or one a line on standard input")
    if config.steering != "none" and not Path(config.steering).exists():
        raise ValueError(f"{config.steering}: no such file (a steering file, or the word none)")
    place = place_on(config.mesh, len(texts))
    loaded, file = load_steered(config.steering, config.model, config.dtype, place.base)
    notes: dict[str, Any] = file.notes if file else {}
    template = "{prompt}" if config.raw else notes.get("template", "{prompt}")
    ask = Ask(
        notes.get("chat", False) if config.chat is None else config.chat,
        config.max_new_tokens or notes.get("max_new_tokens", 64),
    )
    examples = [Example.of(template.replace("{prompt}", text), None, f"prompt {i}") for i, text in enumerate(texts, 1)]
    prompts = make_prompts(examples, loaded.tokenizer, loaded.stop_tokens, ask)
    plan, steering = steered(file)

    def answer(plan: Plan, steering: Steering) -> list[str]:
        model, key = Model(loaded.config, plan), jax.random.key(config.seed)
        with place.on_mesh():
            found = decode(
                model,
                loaded.base,
                place.copies(steering),
                prompts,
                loaded.tokenizer,
                sampling=sampling,
                key=place.copies(key),
                place=place.batch,
            )
        return [d.output for d in found]

    outputs = answer(plan, steering)
    plain = answer((), {}) if config.compare and file else []
    if not is_first():
        return
    for i, text in enumerate(texts):
        if plain:
            print(f"{text}\n  base     {plain[i]!r}\n  steered  {outputs[i]!r}")
        elif len(texts) == 1:
            print(outputs[i])
        else:
            print(f"{text}\n  {outputs[i]}")


if __name__ == "__main__":
    run_main(main)
