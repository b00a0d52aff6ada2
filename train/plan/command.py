"""The command line of `python -m train.plan`."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from typing import Literal

from rich.console import Console

from jaxsteer.io.files import write_json
from train.cli import from_command_line
from train.config import TrainConfig
from train.plan.base_models import model_config_of
from train.plan.figures import Figures, figures_of
from train.plan.report import print_comparison, print_figures
from train.plan.search import search
from train.plan.topology import parse_topology

DESCRIPTION = """Will a run fit, and how fast can it be: on TPUs by compiling its real programs for them here, without a
TPU (with libtpu, the extra "tpu"); on GPUs by an analytic estimate.

Prints, for the training step and for decoding: whether it fits, the peak of a chip's memory and what takes it,
collectives by kind, arithmetic, and the least time that the chip's published figures allow."""


@dataclass(frozen=True)
class PlanConfig(TrainConfig):
    """A run, and what it is planned for."""

    topology: str = "v5e:4x4"
    """The chips: v5e:4x4, v5p:4x4x4, v6e:4x4, ... as JAX's compiler writes them, or h100:8, h200:8."""
    topologies: str = ""
    """Compare several, separated by commas: v5e:4x4,v6e:4x4,h100:8."""
    slices: int = 1
    """Slices of the topology, joined by the data-centre network."""
    programs: tuple[Literal["train", "decode"], ...] = ("train", "decode")
    """Which programs to plan."""
    prompt_length: int = 512
    """Tokens of a prompt in decoding; `eval_batch_size` prompts at a time, `task.max_new_tokens` new tokens."""
    search: bool = False
    """Try meshes, batch sizes and remat policies for the training step, and rank those that fit."""
    best: int = 3
    """Settings of a search that are compiled and shown."""
    estimate: bool = False
    """Only estimate, do not compile: in a second."""
    json: str | None = None
    """Write the figures to this file; "-" prints them instead of the tables."""


def plan(config: PlanConfig) -> list[Figures]:
    """Plan the programs on each topology, and print what is found unless JSON is."""
    console = Console(stderr=True)
    names = config.topologies.split(",") if config.topologies else [config.topology]
    topologies = [parse_topology(name.strip(), config.slices) for name in names]
    model_config = model_config_of(config)
    quiet = config.json == "-"
    found: list[Figures] = []
    if config.search:
        for topology in topologies:
            with console.status(f"searching on {topology.name}"):
                ranked = search(
                    config,
                    model_config,
                    topology,
                    config.best,
                    lambda text: console.print(text, style="dim", highlight=False, soft_wrap=True),
                    compiled=not config.estimate,
                )
            found += [figures for _, figures in ranked]
            if not quiet:
                settings = [str(candidate) for candidate, _ in ranked]
                print_comparison([figures for _, figures in ranked], settings, f"{config.model}: the best that fit")
        return found
    for topology in topologies:
        for which in config.programs:
            with console.status(f"{which} on {topology.name}"):
                found.append(
                    figures_of(
                        which, config, model_config, topology, config.prompt_length, compiled=not config.estimate
                    )
                )
            if not quiet and len(topologies) == 1:
                print_figures(found[-1])
    if not quiet and len(topologies) > 1:
        print_comparison(found, [f"{each.which}, {each.mesh}" for each in found], config.model)
    return found


def main() -> None:
    """Plan a run. Exit status 2 where a program does not fit."""
    config = from_command_line("plan", DESCRIPTION, PlanConfig)
    found = plan(config)
    data = [each.to_json() for each in found]
    if config.json == "-":
        json.dump({"programs": data}, sys.stdout, indent=2)
    elif config.json:
        write_json(config.json, {"programs": data})
    if not all(each.fits for each in found):
        raise SystemExit(2)
