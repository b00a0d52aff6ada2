"""Measure what steering preserves and breaks: `python -m train.robustness a/steering.safetensors`.

One table: the accuracy of each steering file on its task, under perturbed prompts, and on a task it was not trained on,
and how far it moves the model's predictions on neutral text. Answers are kept; existing ones are reused.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Literal

import tyro
from rich.console import Console
from rich.table import Table

from jaxsteer.io import SteeringFile
from jaxsteer.io.files import write_json
from jaxsteer.models.transformer import Model
from jaxsteer.params import Params
from jaxsteer.ranges import Count, Seed, check_ranges
from jaxsteer.types import Plan, Steering
from train.base_models import check_base, find_base, load_steered, read_steered, steered
from train.cli import find_task, load_config_file, run_main
from train.config import TrainConfig
from train.data import Encoding, Example
from train.devices.machine import enable_compilation_cache
from train.devices.placement import MeshConfig, place_on
from train.devices.processes import DistributedConfig, is_first, join
from train.evaluation.answers import By, Normalise, ScoredAnswer, accuracy_of, summarise
from train.evaluation.divergence import divergences
from train.evaluation.evaluator import Evaluator
from train.evaluation.neutral import NEUTRAL, read_neutral
from train.evaluation.statistics import Estimate, crossed_interval
from train.tasks import AnyTask, Split
from train.tasks.perturb import Kind, perturbed
from train.tasks.scoring import percent


@dataclass(frozen=True)
class RobustnessConfig:
    """Measure steering files of one base model on their task, perturbed, transferred, and on neutral text."""

    steering: Annotated[tuple[str, ...], tyro.conf.Positional]
    """Steering files (*.safetensors), or folders of runs; the pretrained model is always in the table."""
    names: tuple[str, ...] = ()
    """Their names in the table; by default the names of their folders."""
    model: str | None = None
    """Base model; by default the one named in the first file."""
    other_base: bool = False
    """Steer a model of the same shape whose weights are not those that the steering was trained on."""
    config: str | None = None
    """Config file of the task to evaluate; by default the task that the first file was trained on."""
    data: str | None = None
    """File to evaluate instead of the task's own data, in the same format."""
    transfer: str | None = None
    """Config file of a related task that was not trained on."""
    perturb: tuple[Kind, ...] = ("typos", "casing")
    """Kinds of perturbation: typos, casing, paraphrase, choices."""
    split: Split = "test"
    """Split of the tasks to evaluate."""
    examples: Count = 512
    """Maximum number of examples per task and perturbation."""
    batch_size: Count = 64
    """Prompts answered at a time."""
    by: By = "generation"
    """Let the model generate its answer, or take the most likely of the example's choices."""
    normalise: Normalise = "none"
    """What to divide the log-likelihood of a choice by: nothing, its number of tokens, or its number of characters."""
    neutral: str = str(NEUTRAL)
    """Text file with one neutral text per line; by default twenty short ones on everyday matters."""
    seed: Seed = 0
    """Random seed for the perturbations."""
    out: str = "runs/robustness"
    """Folder for the answers and the table."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Data type of the weights and the compute; auto: float32 on CPU, bfloat16 on accelerators."""
    mesh: MeshConfig = field(default_factory=MeshConfig)
    """How weights and prompts are sharded over devices."""
    distributed: DistributedConfig = field(default_factory=DistributedConfig)
    """How the processes of a multi-host run find each other."""

    def __post_init__(self) -> None:
        """Reject settings that evaluate nothing."""
        check_ranges(self)


@dataclass(frozen=True)
class Row:
    """A line of the table: one method's answers to each set of examples, and its KL on neutral text, nats per token."""

    name: str
    answers: Mapping[str, Sequence[ScoredAnswer]]
    divergence: Estimate


Methods = Mapping[str, tuple[Plan, Steering]]
"""Plan and steering of each method by its name in the table."""

ExampleSets = dict[str, tuple[AnyTask, list[Example]]]
"""Task and examples of each column of the table."""


def example_sets(config: RobustnessConfig, task: AnyTask, transferred: AnyTask | None) -> ExampleSets:
    """Each column's task and examples: as trained, under each perturbation, transferred.

    Raises:
        ValueError: a set without examples.
    """
    sets = {"as trained": (task, task.load(config.split))}
    sets |= {kind: (task, perturbed(task, config.split, kind, config.seed)) for kind in config.perturb}
    if transferred is not None:
        sets["transferred"] = (transferred, transferred.load(config.split))
    for name, (_, examples) in sets.items():
        if not examples:
            raise ValueError(f"{name}: the task has no {config.split} examples; choose another --split")
    return {name: (own, examples[: config.examples]) for name, (own, examples) in sets.items()}


def measure(
    config: RobustnessConfig,
    evaluator: Evaluator,
    methods: Methods,
    sets: ExampleSets,
    dates: Mapping[str, str | None] = MappingProxyType({}),
) -> list[Row]:
    """Evaluate every method on every set of examples and on the neutral text.

    Args:
        config: the settings.
        evaluator: with the base model.
        methods: by their names.
        sets: from `example_sets`.
        dates: the day that a chat template is to print for a method, where it is not today.
    """
    texts = read_neutral(config.neutral)
    lines = []
    for name, (plan, steering) in methods.items():
        folder = Path(config.out) / name
        folder.mkdir(parents=True, exist_ok=True)
        of_method = evaluator.steered_by(Model(evaluator.loaded.config, plan))
        answers = {}
        for kind, (task, examples) in sets.items():
            path, title = folder / f"{kind.replace(' ', '_')}.jsonl", f"{name}, {kind}"
            of_task = replace(of_method, task=task, encoding=Encoding(chat=task.chat, date=dates.get(name)))
            answers[kind] = of_task.answer(examples, Params(None, steering), path, title=title, reuse=True)
        moved = crossed_interval([divergences(of_method, Params(None, steering), texts)])
        lines.append(Row(name, answers, moved))
    return lines


def table_of(lines: Sequence[Row]) -> list[list[str]]:
    """The table as text, header first."""
    kinds = list(lines[0].answers)
    head = ["method", *(f"{kind}, n = {len(lines[0].answers[kind])}" for kind in kinds), "KL from base, nats per token"]
    cells = lambda line: [percent(accuracy_of(line.answers[kind])) for kind in kinds]
    kl = lambda e: f"{e.mean:.3g} ({max(0.0, e.low):.3g} to {e.high:.3g})"
    return [head, *([line.name, *cells(line), kl(line.divergence)] for line in lines)]


def read_methods(config: RobustnessConfig) -> dict[str, SteeringFile]:
    """The steering files by their names in the table.

    Raises:
        ValueError: no files; one that cannot be read; not a name for each; the same name twice.
    """
    if not config.steering:
        raise ValueError("robustness: give at least one steering file")
    files = [file for path in config.steering if (file := read_steered(path)) is not None]
    if len(files) < len(config.steering):
        raise ValueError("robustness: the pretrained model is always in the table; leave out the word none")
    names = config.names or tuple(file.path.resolve().parent.name for file in files)
    if len(names) != len(config.steering) or len({*names, "base"}) != len(names) + 1:
        raise ValueError(
            f"--names: need a different name, not 'base', for each of the {len(config.steering)} files; got {names}"
        )
    return dict(zip(names, files, strict=True))


def main() -> None:
    """Measure, print the table, and write it."""
    config = tyro.cli(RobustnessConfig, prog="python -m train.robustness", description=__doc__)
    join(config.distributed)
    enable_compilation_cache()
    files = read_methods(config)
    first = next(iter(files.values()))
    task = find_task(config.config, config.data, first.notes)
    transferred = load_config_file(config.transfer, TrainConfig).task if config.transfer else None
    sets = example_sets(config, task, transferred)
    place = place_on(config.mesh, config.batch_size)
    base = find_base(first, config.model)
    for file in list(files.values())[1:]:
        check_base(file, base, other_base=config.other_base)
    loaded, _ = load_steered(first, base, config.dtype, place.base, other_base=config.other_base)
    evaluator = Evaluator(
        model=Model(loaded.config),
        loaded=loaded,
        task=task,
        placement=place,
        eval_batch_size=config.batch_size,
        by=config.by,
        normalise=config.normalise,
    )
    methods: dict[str, tuple[Plan, Steering]] = {"base": ((), {})}
    methods |= {name: steered(file) for name, file in files.items()}
    dates = {"base": first.notes.get("date"), **{name: file.notes.get("date") for name, file in files.items()}}
    lines = measure(config, evaluator, methods, sets, dates)
    if is_first():
        _report(Path(config.out), lines, f"{loaded.name}, 95 % intervals")


def _report(out: Path, lines: Sequence[Row], title: str) -> None:
    """Print the table, and write it as Markdown and JSON."""
    header, *rows = table_of(lines)
    table = Table(*header, title=title, title_justify="left")
    for row in rows:
        table.add_row(*row)
    Console().print(table)
    markdown = ["| " + " | ".join(row) + " |" for row in (header, ["---"] * len(header), *rows)]
    (out / "robustness.md").write_text("\n".join(markdown) + "\n", encoding="utf-8")
    figures = {
        line.name: {
            "divergence": line.divergence._asdict(),
            **{kind: summarise(answers) for kind, answers in line.answers.items()},
        }
        for line in lines
    }
    write_json(out / "robustness.json", figures)
    print(f"table and answers: {out}")


if __name__ == "__main__":
    run_main(main)
