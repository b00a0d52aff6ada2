"""What a training step costs: time and memory of a single run, and of a sweep compared with as many single runs."""

from __future__ import annotations

import statistics
import time
from dataclasses import replace

import jax

from jaxsteer.io import LoadedModel
from train.compare.records import Timing
from train.compare.sweep import SweepProgram
from train.config import TrainConfig
from train.devices.placement import SINGLE
from train.run.training import make_training

REPEATS = 3


def measure(config: TrainConfig, loaded: LoadedModel, runs: int) -> Timing:
    """Time steps of a single run and of a sweep, in turn, after compilation.

    Args:
        config: the run.
        loaded: the base model.
        runs: number of runs in the sweep.
    """
    training = make_training(replace(config, mesh=SINGLE), loaded)
    counts = (1,) if config.train_base else (1, runs)
    compiled, states, frozen = {}, {}, {}
    seconds: dict[int, list[float]] = {count: [] for count in counts}
    compile_seconds: list[float] = []
    for count in counts:
        program = SweepProgram(config, [training] * count, [1.0] * count)
        states[count] = jax.tree.map(lambda leaf: leaf.copy(), program.state)  # a step donates its state
        frozen[count], batch = program.frozen, program.batch(0)
        start = time.perf_counter()
        compiled[count] = program.step.lower(states[count], batch, frozen[count]).compile()
        compile_seconds.append(time.perf_counter() - start)
    for repeat in range(REPEATS + 1):
        for count in counts:
            start = time.perf_counter()
            states[count], _ = jax.block_until_ready(compiled[count](states[count], batch, frozen[count]))
            if repeat:  # the first one touches the memory
                seconds[count].append(time.perf_counter() - start)
    single = statistics.median(seconds[1])
    memory = compiled[1].memory_analysis()
    assert memory is not None
    arguments = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    return {
        "tokens_per_second": float((batch.segments > 0).sum()) / single,
        "step_bytes": int(arguments + memory.temp_size_in_bytes),
        "sweep_cost": None if config.train_base else statistics.median(seconds[runs]) / single,
        "sweep_runs": runs,
        "compile_seconds": compile_seconds,
    }
