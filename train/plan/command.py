"""The command line of `python -m train.plan`, the fit check."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from rich.console import Console

from jaxsteer.io.files import write_json
from jaxsteer.ranges import Count, check_ranges
from train.cli import Run, from_command_line
from train.config import TrainConfig
from train.plan.figures import Figures, figures_of
from train.plan.model_configs import model_config_of
from train.plan.question import Question
from train.plan.report import print_comparison, print_figures
from train.plan.search import search
from train.plan.topology import Topology, parse_topology

DESCRIPTION = """Fit check: does a run fit on a topology, and how fast can it be? For TPUs it compiles the run's actual
training and decoding steps, without a TPU (this needs libtpu: the extra "tpu"); for GPUs it estimates them.

Prints, for each compiled step: whether it fits, peak memory per chip and what uses it, collectives by kind, FLOPs, and
a lower bound on the time from the chips' published peaks. Exit status 2 if a step does not fit."""


@dataclass(frozen=True)
class FitCheckConfig:
    """A run, and the topologies to check it on."""

    run: Run[TrainConfig]
    """The run."""
    topology: str = "v5e:4x4"
    """Chips to check: a TPU topology as JAX's compiler writes it (v5e:4x4, v5p:4x4x4, v6e:4x4, ...) or as it is sold
    (v5litepod-16, v5p-128, v6e-16), or the GPUs of one node (h100:8, h200:8)."""
    topologies: str = ""
    """Compare several topologies, separated by commas: v5e:4x4,v6e:4x4,h100:8."""
    slices: Count = 1
    """Number of slices of the topology, joined by the data-centre network."""
    programs: tuple[Literal["train", "decode"], ...] = ("train", "decode")
    """Compiled steps to check: the training step, decoding, or both."""
    prompt_length: Count = 512
    """Tokens per prompt in decoding, which is `eval_batch_size` prompts with `task.max_new_tokens` new tokens each."""
    search: bool = False
    """Search meshes, batch sizes and remat policies for the training step, and rank those that fit."""
    best: Count = 3
    """Number of settings that a search reports."""
    estimate: bool = False
    """Estimate only, without compiling; takes a second."""
    json: str | None = None
    """Write the figures to this file; "-" writes them to standard output instead of the tables."""

    def __post_init__(self) -> None:
        """Reject settings that nothing can be checked with."""
        check_ranges(self)


def check_fit(config: FitCheckConfig) -> list[Figures]:
    """Check the compiled steps on each topology and print the figures, unless JSON goes to standard output."""
    names = config.topologies.split(",") if config.topologies else [config.topology]
    topologies = [parse_topology(name.strip(), config.slices) for name in names]
    return _search(config, topologies) if config.search else _check(config, topologies)


def _check(config: FitCheckConfig, topologies: Sequence[Topology]) -> list[Figures]:
    """Check the config as it is."""
    model_config, console, quiet = model_config_of(config.run), Console(stderr=True), config.json == "-"
    results: list[Figures] = []
    for topology in topologies:
        for which in config.programs:
            question = Question(which, config.run, model_config, topology, config.prompt_length)
            with console.status(f"{which} on {topology.name}"):
                results.append(figures_of(question, compiled=not config.estimate))
            if not quiet and len(topologies) == 1:
                print_figures(results[-1])
    if not quiet and len(topologies) > 1:
        rows = [(f"({figures.topology.sold}), {figures.which}, mesh {figures.mesh}", figures) for figures in results]
        print_comparison(rows, config.run.model)
    return results


def _search(config: FitCheckConfig, topologies: Sequence[Topology]) -> list[Figures]:
    """Search settings for the training step."""
    model_config, console, quiet = model_config_of(config.run), Console(stderr=True), config.json == "-"
    log = lambda text: console.print(text, style="dim", highlight=False, soft_wrap=True)
    results: list[Figures] = []
    for topology in topologies:
        question = Question("train", config.run, model_config, topology)
        with console.status(f"searching on {topology.name}"):
            ranked = search(question, config.best, log, compiled=not config.estimate)
        results += [figures for _, figures in ranked]
        if not quiet:
            rows = [(str(candidate), figures) for candidate, figures in ranked]
            print_comparison(rows, f"{config.run.model}: the best settings that fit")
    return results


def main() -> None:
    """Run the fit check. Exit status 2 if a compiled step does not fit."""
    config = from_command_line("plan", DESCRIPTION, FitCheckConfig)
    results = check_fit(config)
    data = {"programs": [figures.to_json() for figures in results]}
    if config.json == "-":
        json.dump(data, sys.stdout, indent=2)
    elif config.json:
        write_json(config.json, data)
    if not all(figures.fits for figures in results):
        raise SystemExit(2)
