"""What a training step costs: time and memory of a single run, and of a sweep compared with as many single runs."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence

import jax

from jaxsteer.objectives import batch_of
from train.compare.records import Timing
from train.compare.sweep import SweepProgram
from train.run.memory import compiled_bytes
from train.run.training import Training

REPEATS = 3


def measure(trainings: Sequence[Training], repeats: int = REPEATS) -> Timing:
    """Time steps of a single run and of a sweep, in turn, after compilation.

    Args:
        trainings: the runs of the sweep, on one device; the first is the single run.
        repeats: number of timed pairs of steps; the medians are reported.
    """
    config, runs = trainings[0].config, len(trainings)
    merged = runs > 1
    counts = (1, runs) if merged else (1,)
    programs = {count: SweepProgram(config, trainings[:count], [1.0] * count) for count in counts}
    compiled, states = {}, {}
    seconds: dict[int, list[float]] = {count: [] for count in counts}
    compile_seconds: list[float] = []
    for count, program in programs.items():
        states[count] = jax.tree.map(lambda leaf: leaf.copy(), program.state)  # a step donates its state
        start = time.perf_counter()
        compiled[count] = program.compile(states[count], program.batch(0), program.frozen)
        compile_seconds.append(time.perf_counter() - start)
    for repeat in range(repeats + 1):
        for count, program in programs.items():
            batch = program.batch(0)
            start = time.perf_counter()
            states[count], _ = jax.block_until_ready(
                compiled[count](states[count], batch, program.frozen, program.factors, program.given)
            )
            if repeat:  # the first one touches the memory
                seconds[count].append(time.perf_counter() - start)
    single = statistics.median(seconds[1])
    base = None if config.train_base else programs[1].frozen.base
    bytes_of = {}
    for count in counts:
        needed = compiled_bytes(compiled[count], base, programs[count].given)
        assert needed is not None
        bytes_of[count] = needed
    return {
        "tokens_per_second": float((batch_of(programs[1].batch(0)).segments > 0).sum()) / single,
        "step_bytes": bytes_of[1],
        "sweep_bytes": bytes_of[runs] if merged else None,
        "sweep_cost": statistics.median(seconds[runs]) / single if merged else None,
        "sweep_runs": runs,
        "compile_seconds": compile_seconds,
    }
