"""The stage train8b: steps of an 8B model with a frozen base, and what share of the chip's arithmetic they use."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import jax

from jaxsteer.flops import step_flops
from jaxsteer.models.attention import Kernel
from jaxsteer.models.transformer import Remat
from jaxsteer.params import Params, partition
from jaxsteer.steering import init_steering
from jaxsteer.training import init_state
from jaxsteer.types import PyTree
from train.bench.accelerator.inputs import random_base, random_batch
from train.bench.accelerator.records import Context, Figures, Record, Row, Stage
from train.bench.accelerator.settings import PLANS, POST_BLOCK, AcceleratorBench, Shapes
from train.config import TrainConfig
from train.devices.chips import chip_of
from train.devices.machine import peak_memory_bytes
from train.devices.placement import SINGLE
from train.plan.programs import SCHEDULE_STEPS
from train.run.program import Program, make_program

CAUSAL = 0.5
"""Share of the attention scores that a causal model needs: masked blocks are not counted, whatever a kernel does."""

GOAL = 55.0
"""MFU, in percent, that a step with a frozen base should reach."""


@dataclass(frozen=True)
class Trial:
    """A training step to be measured.

    plan       its slots
    rows       of the batch
    remat      what the backward pass recomputes
    attention  the kernel
    unroll     layers in one iteration of the loop over the layers
    """

    plan: tuple[str, ...]
    rows: int
    remat: Remat = "selective"
    attention: Kernel = "auto"
    unroll: int = 1

    def config(self, shapes: Shapes) -> TrainConfig:
        """The run whose step it is."""
        return TrainConfig(
            plan=self.plan,
            remat=self.remat,
            attention=self.attention,
            batch_size=self.rows,
            sequence_length=shapes.length,
            dtype=shapes.dtype,
            mesh=SINGLE,
        )

    def program(self, shapes: Shapes, base: PyTree, platform: str | None = None) -> Program:
        """Its program, for a base of arrays or of shapes."""
        program = make_program(self.config(shapes), shapes.model, base, steps=SCHEDULE_STEPS, platform=platform)
        return replace(program, model=replace(program.model, unroll=self.unroll))


def measure_training(trial: Trial, shapes: Shapes, steps: int) -> Figures:
    """Compile a step on random weights and tokens, run it once, and time it.

    Args:
        trial: the step.
        shapes: of the model and the rows.
        steps: number of steps to time; the median is reported.
    """
    base = random_base(shapes.model, shapes.dtype)
    program = trial.program(shapes, base)
    model = program.model
    steering = init_steering(model.plan, shapes.model, jax.random.key(0), base=base)
    trained, frozen = partition(Params(base, steering), program.labels)
    state, batch = (
        init_state(trained, program.tx, jax.random.key(1)),
        random_batch(shapes.model, trial.rows, shapes.length),
    )
    began = time.perf_counter()
    compiled = program.jitted.lower(state, batch, frozen).compile()
    compile_seconds = time.perf_counter() - began
    seconds: list[float] = []
    loss = 0.0
    for _ in range(steps + 1):  # the first touches the memory
        began = time.perf_counter()
        state, metrics = compiled(state, batch, frozen)
        loss = float(metrics.loss)
        seconds.append(time.perf_counter() - began)
    if not 0 < loss < float("inf"):
        raise FloatingPointError(f"the loss of a step is {loss}")
    tokens = trial.rows * shapes.length
    flops = step_flops(model, trial.rows, shapes.length, tokens - trial.rows, causal_share=CAUSAL).useful
    return _figures(statistics.median(seconds[1:]), tokens, flops) | {
        "attention": program.attention[0],
        "loss": loss,
        "compile, s": compile_seconds,
        "temporaries, GB": _temporaries(compiled) / 1e9,
        "peak memory, GB": peak_memory_bytes() / 1e9,
    }


def _figures(seconds: float, tokens: int, flops: float) -> Figures:
    """Speed of a step, and the share of the chip's published peak that its needed arithmetic is; None on a CPU."""
    chip = chip_of(jax.devices()[0].device_kind)
    return {
        "tokens/s": tokens / seconds,
        "MFU, %": None if chip is None else 100 * flops / seconds / chip.flops,
        "seconds per step": seconds,
        "TFLOP/s": flops / seconds / 1e12,
    }


def _temporaries(compiled: jax.stages.Compiled) -> int:
    memory: Any = compiled.memory_analysis()
    return memory.temp_size_in_bytes


def rows_of(size: int) -> str:
    """A number of rows in words."""
    return f"{size} row{'s' * (size > 1)}"


def row_of(name: str, trial: Trial, config: AcceleratorBench, flags: str = "") -> Row:
    """A row of the table that measures a training step.

    Args:
        name: of the row.
        trial: the step.
        config: of the command.
        flags: XLA's, for its process.
    """
    shapes = config.shapes

    def measure(context: Context) -> Figures:
        return measure_training(trial, shapes, config.steps)

    settings = asdict(trial) | {"small": config.small, "steps": config.steps, "flags": flags}
    seconds = 60.0 + 5.0 * trial.unroll  # more layers in the loop compile longer
    environment = {"XLA_FLAGS": flags} if flags else {}
    family = str(settings | {"rows": None})  # the same but for the number of rows
    return Row(name, measure, settings, seconds, family=family, size=trial.rows, environment=environment)


def rows(config: AcceleratorBench, records: Sequence[Record]) -> list[Row]:
    """The plans at every number of rows, then what else the post-block step might gain from."""
    batches = config.shapes.batches
    of_plans = [
        row_of(f"{name}, {rows_of(size)}", Trial(plan, size), config)
        for size in batches
        for name, plan in PLANS.items()
    ]
    first = Trial(POST_BLOCK, batches[0])
    variations = {
        "nothing recomputed": replace(first, remat="none", rows=batches[1]),
        "blocks recomputed": replace(first, remat="full", rows=2 * max(batches)),
        "chunked attention": replace(first, attention="chunked"),
        "2 layers at a time": replace(first, unroll=2),
        "4 layers at a time": replace(first, unroll=4),
    }
    others = [row_of(f"post-block, {rows_of(trial.rows)}, {name}", trial, config) for name, trial in variations.items()]
    flags = "--xla_gpu_enable_triton_gemm=false"
    cublas = row_of(f"post-block, {rows_of(first.rows)}, cuBLAS alone", first, config, flags)
    return [*of_plans, *others, cublas]


def summary(records: Sequence[Record]) -> list[str]:
    """The best step of each plan, against the goal."""
    lines = []
    for name in PLANS:
        found = [r for r in records if r.row.startswith(f"{name},") and r.figures.get("MFU, %") is not None]
        if found:
            best = max(found, key=lambda record: record.figures["MFU, %"])
            lines.append(f"{name}: at best {best.figures['MFU, %']:.1f} % ({best.row}); the goal is {GOAL:.0f} %.")
    return lines


STAGE = Stage(
    "train8b",
    "steps of a frozen 8B model at 2,048 tokens: post-block steering, LoRA, both; MFU and memory",
    rows,
    summary,
)
