"""docs/plans.md: every large config on every topology, checked once and stored in docs/plans.json."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from dataclasses import replace
from itertools import product
from pathlib import Path
from statistics import mean
from typing import cast, get_args

from jaxsteer.io.files import read_json, replacing, write_json
from train.cli import load_config_file
from train.config import TrainConfig
from train.plan.estimate import estimate_training, estimated_program
from train.plan.figures import FiguresJson, figures_of
from train.plan.model_configs import model_config_of
from train.plan.question import Question, Which
from train.plan.search import MARGIN
from train.plan.topology import GIB, parse_topology

ROOT = Path(__file__).parents[2]
DATA, PAGE = ROOT / "docs" / "plans.json", ROOT / "docs" / "plans.md"
MODELS = ("llama3_8b", "llama3_70b", "qwen2_5_7b", "mistral_7b", "gemma2_9b")
CONFIGS = tuple(f"{model}_{kind}" for kind in ("post_block", "lora", "joint") for model in MODELS)
TOPOLOGIES = ("v5e:4x4", "v5p:4x4x4", "v6e:4x4", "h100:8")
PROMPT_LENGTH = 512
MAX_MICROBATCHES = 64


class StepRow(FiguresJson):
    """One compiled step in docs/plans.json, under "CONFIG TOPOLOGY train" or "CONFIG TOPOLOGY decode"."""

    batch_size: int
    sequence_length: int
    grad_accumulation: int


Rows = dict[str, StepRow]

DESCRIPTION = """Check every large config on every topology, and write docs/plans.md.

Results are stored in docs/plans.json after every compiled step, and an interrupted run continues from them; delete that
file to start over."""


def check_step(name: str, topology: str, which: Which) -> StepRow:
    """Check one compiled step of a config.

    The training step is accumulated over the fewest microbatches that fit; its batch size stays the config's.
    """
    config = load_config_file(ROOT / "configs" / f"{name}.py", TrainConfig)
    question = Question(which, config, model_config_of(config), parse_topology(topology), PROMPT_LENGTH)
    if which == "decode":
        return _row(question)
    chips, microbatches = question.topology, config.grad_accumulation
    while True:
        attempt = question.with_config(replace(config, grad_accumulation=microbatches))
        last = microbatches == MAX_MICROBATCHES or config.batch_size // (2 * microbatches) < chips.chips
        guess = estimate_training(estimated_program(attempt), attempt.config)
        if last or guess.peak <= MARGIN * chips.chip.memory:
            row = _row(attempt)
            if last or row["fits"]:
                return row
        microbatches *= 2


def _row(question: Question) -> StepRow:
    config = question.config
    figures = figures_of(question).to_json()
    figures.pop("compile_seconds", None)  # differs from machine to machine
    figures.pop("expected", None)  # follows from the others
    return {
        **figures,
        "batch_size": config.batch_size,
        "sequence_length": config.sequence_length,
        "grad_accumulation": config.grad_accumulation,
    }


def collect() -> Rows:
    """The rows of docs/plans.json, after checking those that are missing; saves both files after each."""
    rows = cast(Rows, read_json(DATA)) if DATA.exists() else {}
    steps = product(get_args(Which), CONFIGS, TOPOLOGIES)
    keys = [f"{name} {topology} {which}" for which, name, topology in steps]
    for number, key in enumerate(keys, 1):
        if key not in rows:
            name, topology, which = key.split()
            print(f"{number} of {len(keys)}: {key}", file=sys.stderr, flush=True)
            rows[key] = check_step(name, topology, cast(Which, which))
            rows = {key: rows[key] for key in keys if key in rows}
            write_json(DATA, rows)
            write_page(rows)
    return rows


def write_page(rows: Rows) -> None:
    """Write docs/plans.md."""
    with replacing(PAGE) as file:
        file.write(page(rows).encode())


def page(rows: Mapping[str, StepRow]) -> str:
    """docs/plans.md as text."""
    lines = [INTRODUCTION, "## Training", "", TRAINING_HEAD, "|---|---|---|---|---:|---:|---:|---:|---:|"]
    decoding = []
    for key, row in rows.items():
        name, _, which = key.split()
        title = f"[{name}](../configs/{name}.py)"
        if which == "train":
            lines.append(_line(title, _chips(row), _batch(row), row["mesh"], *_memory(row), *_speed(row)))
        else:
            decoding.append(_line(title, _chips(row), *_memory(row), _speed(row)[0]))
    if decoding:
        lines += ["", "## Decoding", "", DECODING, "", DECODING_HEAD, "|---|---|---:|---:|---:|---:|", *decoding]
    return "\n".join([*lines, *_accuracy(rows)]) + "\n"


def _accuracy(rows: Mapping[str, StepRow]) -> list[str]:
    """The lines that compare estimated with compiled peaks."""
    errors: dict[Which, list[float]] = {"train": [], "decode": []}
    for row in rows.values():
        if row["compiled"] and row["fits"]:
            errors[row["which"]].append(100 * (row["estimated"] / row["needed"] - 1))
    names: dict[Which, str] = {"train": "training", "decode": "decoding"}
    lines = [
        f"- {names[which]}: {min(values):+.0f} to {max(values):+.0f} %, mean absolute error "
        f"{mean(map(abs, values)):.0f} % ({len(values)} compiled steps)"
        for which, values in errors.items()
        if values
    ]
    heading = ["", "## Accuracy of the estimate", "", "Estimated peaks relative to the compiled peaks above:", ""]
    return heading + lines if lines else []


INTRODUCTION = """# Does it fit, and how fast can it be?

Written by `python -m train.plan.table` from [plans.json](plans.json). For TPUs, each config's actual training and
decoding steps were compiled for the topology, without a TPU, by libtpu 0.0.42 under jax 0.10.2
(`JAX_OPTIMIZATION_LEVEL=O1`), and the peak is the compiler's. For GPUs, the peak is the analytic estimate, marked ≈;
nothing was compiled. No step was run.

Tokens/s and MFU are upper bounds: the roofline of the chips' published peaks, for full rows with every position
supervised. "In 4" is a batch accumulated over 4 microbatches, the fewest that fit. Collectives are the GiB that one
chip sends per run of the step.
"""

TRAINING_HEAD = (
    "| config | chips | batch | mesh | peak GiB per chip | limit | collectives, GiB | max tokens/s | max MFU |"
)
DECODING_HEAD = "| config | chips | peak GiB per chip | limit | collectives, GiB | max tokens/s |"
DECODING = """64 prompts of 512 tokens at a time, 256 new tokens each, on the training mesh. On it every generated token
gathers every weight over `fsdp`, so decoding is bound by the network."""


def _line(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def _chips(row: StepRow) -> str:
    return row["topology"] if row["topology"] == row["sold"] else f"{row['topology']} ({row['sold']})"


def _batch(row: StepRow) -> str:
    text = f"{row['batch_size']} x {row['sequence_length']:,}"
    return text + f" in {row['grad_accumulation']}" if row["grad_accumulation"] > 1 else text


def _memory(row: StepRow) -> tuple[str, str, str]:
    sent = sum(traffic["sent"] for traffic in row["collectives"].values()) / GIB
    mark = "" if row["compiled"] else "≈ "
    needed = row["needed"] / GIB
    peak = f"{mark}{needed:.1f}" if row["fits"] else f"does not fit ({needed:.1f})"
    return peak, f"{row['limit'] / GIB:.1f}", f"{sent:.1f}" if row["compiled"] and row["fits"] else "-"


def _speed(row: StepRow) -> tuple[str, str]:
    if not row["fits"]:
        return "-", "-"
    return f"{row['tokens_per_second']:,.0f}", f"{100 * row['mfu']:.0f} %"


def main() -> None:
    """Check what is missing and write the page."""
    parser = argparse.ArgumentParser(
        prog="python -m train.plan.table",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.parse_args()
    write_page(collect())
