"""Evaluate a steering file, and the pretrained model beside it: `python -m train.evaluate runs/x/steering.safetensors`.

Answers are generated (or chosen by likelihood), scored, and written one per line into a JSONL file. A killed evaluation
resumes where it was when the command is repeated.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
import tyro
from rich.console import Console
from rich.table import Table

from jaxsteer.io.files import write_json
from jaxsteer.models.transformer import Model
from jaxsteer.params import Params
from jaxsteer.ranges import Count, Seed, check_ranges
from jaxsteer.steering import keep_kind
from jaxsteer.types import Kind, Plan, Steering
from train.base_models import load_steered, read_steered, steered
from train.cli import find_task, run_main
from train.data import Encoding, Example
from train.devices.machine import enable_compilation_cache
from train.devices.placement import MeshConfig, place_on
from train.devices.processes import DistributedConfig, is_first, join
from train.evaluation.answers import By, Normalise, ScoredAnswer, accuracy_of, summarise
from train.evaluation.evaluator import Evaluator
from train.evaluation.statistics import Paired, check_same_examples, compare_answers, find_answers, key_of, keys_of
from train.evaluation.strength import parse_strength, show_strength
from train.tasks import AnyTask, Split
from train.tasks.perturb import Kind as Perturbation
from train.tasks.perturb import perturbed
from train.tasks.scoring import percent

Part = Literal["all", "lora_only", "steering_only"]


@dataclass(frozen=True)
class EvaluateConfig:
    """Measure the accuracy of a steered model on held-out examples."""

    steering: Annotated[str, tyro.conf.Positional]
    """A steering file (*.safetensors), or the folder of a run that has one; "none" for the pretrained model."""
    model: str | None = None
    """Base model; by default the one named in the steering file."""
    other_base: bool = False
    """Steer a model of the same shape whose weights are not those that the steering was trained on."""
    strength: tuple[str, ...] = ()
    """Strength of the steering: 0 the base, 1 as trained, 2 twice the shift; for all slots (0.5) or for some
    (lora=0.5 post_block=2)."""
    config: str | None = None
    """Config file of the task to evaluate; by default the task that the steering was trained on."""
    data: str | None = None
    """File to evaluate instead of the task's own data, in the same format; prompts keep the task's template."""
    split: Split = "test"
    """Split of the task to evaluate."""
    perturb: Perturbation | None = None
    """Perturb the questions: typos, another casing, a paraphrase, or the choices in another order."""
    perturb_seed: Seed = 0
    """Random seed for the perturbation."""
    examples: Count = 512
    """Maximum number of examples."""
    batch_size: Count = 64
    """Prompts answered at a time."""
    by: By = "generation"
    """Let the model generate its answer, or take the most likely of the example's choices."""
    normalise: Normalise = "none"
    """What to divide the log-likelihood of a choice by: nothing, its number of tokens, or its number of characters."""
    against: str | None = None
    """Answers to the same examples (a .jsonl file, or the folder of an evaluation) to compare each part with, example
    by example."""
    base: bool = True
    """Also evaluate the pretrained model."""
    parts: tuple[Part, ...] = ("all",)
    """Parts of a joint adaptation to evaluate: all of it, only its LoRA, only its steering; one or more."""
    out: str | None = None
    """Folder for the answers and the summary; by default `evaluation` in the run's folder."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Data type of the weights and the compute; auto: float32 on CPU, bfloat16 on accelerators."""
    mesh: MeshConfig = field(default_factory=MeshConfig)
    """How weights and prompts are sharded over devices."""
    distributed: DistributedConfig = field(default_factory=DistributedConfig)
    """How the processes of a multi-host run find each other."""

    def __post_init__(self) -> None:
        """Reject settings that evaluate nothing."""
        check_ranges(self)


def part_of(plan: Plan, steering: Steering, part: Part) -> Steering:
    """The steering with only one part of a joint plan switched on.

    Raises:
        ValueError: the plan has nothing of that part.
    """
    if part == "all":
        return steering
    kind: Kind = "weight" if part == "lora_only" else "activation"
    if not any(slot.method.kind == kind for slot in plan):
        raise ValueError(f"--parts {part}: the plan has no {kind} method, only {', '.join(slot.name for slot in plan)}")
    return keep_kind(plan, steering, kind)


def variants(config: EvaluateConfig, plan: Plan, steering: Steering) -> dict[str, Steering]:
    """What to evaluate, by name: "base" for the pretrained model, "steered" for all of a plan, or the parts' names."""
    if not plan:
        return {"base": {}}
    names = {part: "steered" if part == "all" else part for part in config.parts}
    steered = {name: part_of(plan, steering, part) for part, name in names.items()}
    # All-zero steering is the identity, so the base is answered by the same compiled program.
    return {"base": jax.tree.map(jnp.zeros_like, steering), **steered} if config.base else steered


def read_examples(config: EvaluateConfig, task: AnyTask) -> list[Example]:
    """The examples to evaluate.

    Raises:
        ValueError: there are none, or none with an answer.
    """
    if config.perturb is None:
        examples = task.load(config.split)
    else:
        examples = perturbed(task, config.split, config.perturb, config.perturb_seed)
    if not examples:
        raise ValueError(f"the task has no {config.split} examples; choose another --split, or give a file: --data")
    examples = examples[: config.examples]
    answered = [example for example in examples if example.gold is not None or example.choices]
    if not answered:
        raise ValueError(
            f"{examples[0].source}: no answer to compare with, nor has any other of the {len(examples)} examples one "
            "(plain texts have none); `jaxsteer generate` writes answers without marking them"
        )
    if left_out := len(examples) - len(answered):
        print(f"note: {left_out} of {len(examples)} examples have no answer, and are left out", file=sys.stderr)
    return answered


def find_others(config: EvaluateConfig, names: Sequence[str]) -> dict[str, list[ScoredAnswer]]:
    """What each part is compared with (--against), by its name; the pretrained model only if it is alone."""
    if config.against is None:
        return {}
    compared = [name for name in names if name != "base"] or names
    return {name: find_answers(config.against, name, named=len(compared) > 1) for name in compared}


def print_table(title: str, answers: Mapping[str, Sequence[ScoredAnswer]]) -> None:
    """One line per variant: accuracy, answers cut off by the token limit, answers that rounding may have decided."""
    table = Table(title=title, title_justify="left")
    for column in ("model", "accuracy (95 %)", "unfinished answers", "low-margin answers"):
        table.add_column(column)
    for name, some in answers.items():
        counts = summarise(some)
        table.add_row(name, percent(accuracy_of(some)), str(counts["truncated"]), str(counts["low_margin"]))
    Console().print(table)


def main() -> None:
    """Evaluate and print a table."""
    config = tyro.cli(EvaluateConfig, prog="python -m train.evaluate", description=__doc__)
    join(config.distributed)
    enable_compilation_cache()
    file = read_steered(config.steering)
    task = find_task(config.config, config.data, file.notes if file else {})
    examples = read_examples(config, task)
    plan, steering = steered(file)
    strength = parse_strength(config.strength, plan)
    params = variants(config, plan, steering)
    others = find_others(config, list(params))
    place = place_on(config.mesh, config.batch_size)
    loaded, _ = load_steered(
        file or config.steering, config.model, config.dtype, place.base, other_base=config.other_base
    )
    evaluator = Evaluator(
        model=Model(loaded.config, plan),
        loaded=loaded,
        task=task,
        placement=place,
        eval_batch_size=config.batch_size,
        by=config.by,
        normalise=config.normalise,
        strength=strength,
        encoding=Encoding(chat=task.chat, date=file.notes.get("date") if file else None),
    )
    for other in others.values():
        check_same_examples(keys_of(evaluator.prompts(examples)), [key_of(answer) for answer in other])
    beside = file.path.parent if file else Path("runs")
    out = beside / "evaluation" if config.out is None else Path(config.out)
    out.mkdir(parents=True, exist_ok=True)
    answers = {
        name: evaluator.answer(examples, Params(None, tree), out / f"{name}.jsonl", title=f"Evaluating {name}")
        for name, tree in params.items()
    }
    compared = {name: compare_answers(answers[name], other) for name, other in others.items()}
    if is_first():
        _report(config, out, answers, compared, strength)


def _report(
    config: EvaluateConfig,
    out: Path,
    answers: Mapping[str, Sequence[ScoredAnswer]],
    compared: Mapping[str, Paired],
    strength: Mapping[str, float] | None,
) -> None:
    """Write the summary, print the table and a line for each comparison."""
    count = len(next(iter(answers.values())))
    summary: dict[str, Any] = {name: summarise(some) for name, some in answers.items()}
    for name, paired in compared.items():
        summary[name]["against"] = {"answers": config.against, **asdict(paired)}
    asked = {"split": config.split, "perturbed": config.perturb, "examples": count, "strength": strength}
    write_json(out / "summary.json", asked | summary)
    print_table(f"{config.split}: {count} examples{show_strength(strength)}", answers)
    for name, paired in compared.items():
        print(f"{name} against {config.against}: {paired}")
    print(f"answers and summary: {out}")


if __name__ == "__main__":
    run_main(main)
