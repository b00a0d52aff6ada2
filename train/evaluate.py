"""Evaluate a steering file, and the untouched model beside it: `python -m train.evaluate runs/x/steering.safetensors`.

Answers are decoded (or chosen by likelihood), scored, and kept one a line in a JSONL file. A killed evaluation goes on
where it was when it is called again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
import tyro
from rich.console import Console
from rich.table import Table

from jaxsteer.io.files import write_json
from jaxsteer.steering import keep_kind
from jaxsteer.types import Kind, Plan, Steering
from train.base_models import load_steered, steered
from train.cli import find_task, run_main
from train.devices.machine import enable_compilation_cache
from train.devices.placement import MeshConfig, place_on
from train.devices.processes import DistributedConfig, is_first, join
from train.evaluation.answers import Normalise, accuracy_of
from train.evaluation.saved import Answering, By, summary_of
from train.evaluation.statistics import compare_answers, find_answers
from train.tasks import Split
from train.tasks.perturb import Kind as Perturbation
from train.tasks.perturb import perturbed
from train.tasks.scoring import percent

Part = Literal["all", "lora_only", "steering_only"]


@dataclass(frozen=True)
class EvaluateConfig:
    """Accuracy of a steered model on held-out examples."""

    steering: Annotated[str, tyro.conf.Positional]
    """A steering file (*.safetensors), or "none" for the plain model."""
    model: str | None = None
    """The base model; by default the one named in the steering file."""
    config: str | None = None
    """A config file whose task is evaluated; by default the task of the training run."""
    data: str | None = None
    """A file of the task's kind to evaluate instead, with the template that the steering was trained with."""
    split: Split = "test"
    """Which examples of the task."""
    perturb: Perturbation | None = None
    """Ask otherwise: with typos, in another casing, in other words, or with the choices in another order."""
    perturb_seed: int = 0
    """Of the perturbation."""
    examples: int = 512
    """The most examples."""
    batch_size: int = 64
    """Prompts answered at a time."""
    by: By = "generation"
    """Let the model write its answer, or take the likeliest of the example's choices."""
    normalise: Normalise = "none"
    """What the log-likelihood of a choice is divided by: none, its tokens or its characters."""
    against: str | None = None
    """Answers to the same examples (a .jsonl file, or a folder of an evaluation) to compare with, one by one."""
    base: bool = True
    """Evaluate the untouched model too."""
    parts: tuple[Part, ...] = ("all",)
    """Of a joint adaptation: all of it, its LoRA alone (lora_only), its steering alone (steering_only); one or more."""
    out: str | None = None
    """Folder for the answers and the summary; by default `evaluation` beside the steering file."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of the weights and the compute: auto = float32 on CPU, bfloat16 on accelerators."""
    mesh: MeshConfig = field(default_factory=MeshConfig)
    """How weights and prompts are spread over several devices."""
    distributed: DistributedConfig = field(default_factory=DistributedConfig)
    """How processes on several hosts find each other."""


def part_of(plan: Plan, steering: Steering, part: Part) -> Steering:
    """The steering with only a part of a joint plan switched on.

    Raises:
        ValueError: the plan has nothing of that part.
    """
    if part == "all":
        return steering
    kind: Kind = "weight" if part == "lora_only" else "activation"
    if not any(slot.method.kind == kind for slot in plan):
        raise ValueError(f"--parts {part}: the plan has no {kind} method, only {', '.join(slot.name for slot in plan)}")
    return keep_kind(plan, steering, kind)


def names_of(parts: Sequence[Part], *, steered: bool) -> list[tuple[str, Part]]:
    """The name of each evaluation with its part: "steered" for all of a steering file, "base" without one."""
    if not steered:
        return [("base", "all")]
    return [("steered" if part == "all" else part, part) for part in dict.fromkeys(parts)]


def main() -> None:
    """Evaluate and print a table."""
    config = tyro.cli(EvaluateConfig, prog="python -m train.evaluate", description=__doc__)
    join(config.distributed)
    enable_compilation_cache()
    if config.steering != "none" and not Path(config.steering).exists():
        raise ValueError(f"{config.steering}: no such file (a steering file, or the word none)")
    place = place_on(config.mesh, config.batch_size)
    loaded, file = load_steered(config.steering, config.model, config.dtype, place.base)
    task = find_task(config.config, config.data, file.notes if file else {})
    if config.perturb is None:
        examples = task.load(config.split)[: config.examples]
    else:
        examples = perturbed(task, config.split, config.perturb, config.perturb_seed)[: config.examples]
    if not examples:
        raise ValueError(f"the task has no {config.split} examples")
    plan, steering = steered(file)
    runs = {name: part_of(plan, steering, part) for name, part in names_of(config.parts, steered=file is not None)}
    if file and config.base:
        runs = {"base": jax.tree.map(jnp.zeros_like, steering), **runs}
    last = next(reversed(runs))
    other = None if config.against is None else find_answers(config.against, last)

    beside = Path(config.steering).parent if file else Path("runs")
    out = Path(config.out) if config.out else beside / "evaluation"
    out.mkdir(parents=True, exist_ok=True)
    table = Table(title=f"{config.split}: {len(examples)} examples", title_justify="left")
    for column in ("model", "accuracy (95 %)", "unfinished answers", "near ties"):
        table.add_column(column)
    asking = Answering(
        config.model or (file.model_name if file else ""), loaded, place, config.batch_size, config.by, config.normalise
    )
    summary: dict[str, Any] = {}
    compared = None
    for name, params in runs.items():
        answers = asking.answer(out / f"{name}.jsonl", f"Evaluating {name}", examples, task, plan, params)
        summary[name] = summary_of(answers)
        table.add_row(name, percent(accuracy_of(answers)), *(str(summary[name][k]) for k in ("truncated", "near_ties")))
        if other is not None and name == last:
            compared = compare_answers(answers, other)
            summary[name]["against"] = {"answers": config.against, **asdict(compared)}
    if is_first():
        asked = {"split": config.split, "perturbed": config.perturb, "examples": len(examples)}
        write_json(out / "summary.json", asked | summary)
        Console().print(table)
        if compared is not None:
            print(f"{last} against {config.against}: {compared}")
        print(f"answers and summary: {out}")


if __name__ == "__main__":
    run_main(main)
