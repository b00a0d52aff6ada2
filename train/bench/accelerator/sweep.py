"""The stage sweep: several learning rates or seeds as one program, against as many single runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from jaxsteer.io import LoadedModel
from train.bench.accelerator.inputs import random_base
from train.bench.accelerator.records import Context, Figures, Row, Stage
from train.bench.accelerator.settings import PLANS, AcceleratorBench
from train.compare.timing import measure
from train.config import TrainConfig
from train.data import DataSource, Report, TokenizedExample
from train.devices.machine import peak_memory_bytes
from train.devices.placement import SINGLE
from train.run.training import RunData, Training, make_training


def _trainings(plan: tuple[str, ...], seeds: Sequence[int], config: AcceleratorBench) -> list[Training]:
    """Runs on random tokens: those of one seed share their data."""
    shapes = config.shapes
    model, (size, length) = shapes.sweep_model, shapes.sweep_batch
    loaded = LoadedModel(model, random_base(model, shapes.dtype), None, "random", "", "llama", ())
    draw = np.random.default_rng(0)
    tokens = draw.integers(0, model.vocab_size, (4 * size, length)).astype(np.int32)
    examples = [TokenizedExample(ids, np.ones(length, bool), 1, "random") for ids in tokens]
    report = Report(len(examples), tokens.size, tokens.size, length, length)
    run = TrainConfig(plan=plan, batch_size=size, sequence_length=length, steps=1000, dtype=shapes.dtype, mesh=SINGLE)
    made: dict[int, Training] = {}
    for seed in seeds:
        if seed not in made:
            data = RunData(DataSource(examples, size, length, seed), report)
            made[seed] = make_training(replace(run, seed=seed), loaded, data=data)
    return [made[seed] for seed in seeds]


def _measure(plan: tuple[str, ...], other_seeds: bool, context: Context) -> Figures:
    runs = context.config.shapes.runs
    timing = measure(_trainings(plan, list(range(runs)) if other_seeds else [0] * runs, context.config))
    cost, memory = timing["sweep_cost"], timing["sweep_bytes"]
    assert cost is not None
    assert memory is not None
    return {
        "runs": runs,
        "one program, in single runs": cost,
        "speed-up": runs / cost,
        "single, tokens/s": timing["tokens_per_second"],
        "single, GB": timing["step_bytes"] / 1e9,
        "one program, GB": memory / 1e9,
        "peak memory, GB": peak_memory_bytes() / 1e9,
        "compile single, s": timing["compile_seconds"][0],
        "compile one program, s": timing["compile_seconds"][1],
    }


def rows(config: AcceleratorBench, records: Sequence[Any]) -> list[Row]:
    """Learning rates, which share their batches, and seeds, which do not, for each plan."""
    shapes = config.shapes
    return [
        Row(
            f"{name}, {shapes.runs} {'seeds' if other_seeds else 'learning rates'}",
            partial(_measure, plan, other_seeds),
            {"plan": list(plan), "seeds": other_seeds, "batch": list(shapes.sweep_batch), "small": config.small},
            seconds=90.0,
        )
        for name, plan in PLANS.items()
        for other_seeds in (False, True)
    ]


STAGE = Stage("sweep", "eight learning rates or seeds of SmolLM2-135M's shape as one program, in runs", rows)
