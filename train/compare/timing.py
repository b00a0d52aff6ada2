"""What a step costs: time and memory of one run, and of a sweep of several against as many runs."""

from __future__ import annotations

import statistics
import time
from dataclasses import replace
from typing import Any

import jax

from jaxsteer.io import LoadedModel
from train.compare.sweep import SweepProgram
from train.config import TrainConfig
from train.devices.placement import SINGLE
from train.run.training import make_training

REPEATS = 3


def measure(config: TrainConfig, loaded: LoadedModel, runs: int) -> dict[str, Any]:
    """Time steps of one run and of a sweep of `runs` learning rates, taking turns, after compilation.

    Returns:
        tokens_per_second: of one run, real tokens. step_bytes: the most memory that the compiled step of one run needs,
        weights, state and temporaries together. sweep_cost: seconds of a step of the sweep, over those of one run
        (K runs one after another cost K); None where the base itself trains, whose runs are not merged. sweep_runs: K.
        compile_seconds: of one run's step and of the sweep's.
    """
    training = make_training(replace(config, mesh=SINGLE), loaded)
    counts = (1,) if config.train_base else (1, runs)
    compiled, states, frozen = {}, {}, {}
    seconds: dict[int, list[float]] = {}
    compiling: dict[int, float] = {}
    for count in counts:
        program = SweepProgram(config, [training] * count, [1.0] * count)
        states[count] = jax.tree.map(lambda leaf: leaf.copy(), program.state)  # a step donates its state
        frozen[count], batch = program.frozen, program.batch(0)
        began = time.perf_counter()
        compiled[count] = program.step.lower(states[count], batch, frozen[count]).compile()
        compiling[count], seconds[count] = time.perf_counter() - began, []
    for repeat in range(REPEATS + 1):
        for count in counts:
            began = time.perf_counter()
            states[count], _ = jax.block_until_ready(compiled[count](states[count], batch, frozen[count]))
            if repeat:  # the first touches the memory
                seconds[count].append(time.perf_counter() - began)
    one = statistics.median(seconds[1])
    memory = compiled[1].memory_analysis()
    held = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    return {
        "tokens_per_second": float((batch.segments > 0).sum()) / one,
        "step_bytes": int(held + memory.temp_size_in_bytes),
        "sweep_cost": None if config.train_base else statistics.median(seconds[runs]) / one,
        "sweep_runs": runs,
        "compile_seconds": list(compiling.values()),
    }
