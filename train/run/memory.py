"""Running out of device memory, in words: what was being computed, and which settings make it smaller."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import jax

from jaxsteer.types import PyTree
from train.config import TrainConfig

What = Literal["step", "evaluation"]


@contextmanager
def enough_memory(config: TrainConfig, what: What, *, runs: int = 1) -> Iterator[None]:
    """Turn the runtime's RESOURCE_EXHAUSTED into advice.

    Args:
        config: of the run.
        what: what is computed.
        runs: number of runs of a comparison that train together.

    Raises:
        ValueError: the devices ran out of memory.
    """
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise ValueError(f"out of memory: {_advice(config, what, runs)} ({_asked(str(error))})") from error


def _advice(config: TrainConfig, what: What, runs: int) -> str:
    if runs > 1:
        return f"{runs} runs train together as one program; {runs // 2} at a time need less (--together {runs // 2})"
    plan = "`jaxsteer plan` estimates what fits"
    if what == "evaluation":
        return (
            f"evaluation answers {config.eval_batch_size} prompts at a time; lower --eval-batch-size, or "
            f"--task.max-new-tokens (now {config.task.max_new_tokens}); {plan}"
        )
    rows, length = config.microbatch, config.sequence_length
    more = (
        f"raise --grad-accumulation (now {config.grad_accumulation}; it must divide --batch-size), " if rows > 1 else ""
    )
    base = "train a plan instead of --train-base" if config.train_base else "--quantise int8 makes the base smaller"
    return (
        f"a step computes {rows} rows of {length:,} tokens at a time; {more}lower --sequence-length or --batch-size "
        f"({config.batch_size}), or use --remat full; {base}; {plan}"
    )


def _asked(message: str) -> str:
    """The runtime's own words: how much it asked for."""
    line = next(line for line in message.splitlines() if "RESOURCE_EXHAUSTED" in line)
    line = line[line.index("RESOURCE_EXHAUSTED") :].removeprefix("RESOURCE_EXHAUSTED:").strip()
    return (
        re.sub(r"\b(\d{6,}) bytes", lambda match: f"{int(match[1]) / 1e9:,.2f} GB", line)[:200] or "RESOURCE_EXHAUSTED"
    )


def compiled_bytes(compiled: jax.stages.Compiled, base: PyTree, given: PyTree) -> int | None:
    """Memory that a compiled step needs on each device: arguments, results and temporaries.

    Args:
        compiled: the step.
        base: the frozen base among its arguments, arrays or shapes; None if it trains.
        given: what its objective is given; the leaves that are the base's own are counted once.

    Returns:
        Bytes; None if the compiler does not say.
    """
    memory = compiled.memory_analysis()
    if memory is None:
        return None
    known = {id(leaf) for leaf in jax.tree.leaves(base)}
    again = sum(_bytes_of(leaf) for leaf in jax.tree.leaves(given) if id(leaf) in known)
    arguments = memory.argument_size_in_bytes - again + memory.output_size_in_bytes - memory.alias_size_in_bytes
    return int(arguments + memory.temp_size_in_bytes)


def _bytes_of(leaf: Any) -> int:
    """Bytes of an array, or of its shape, on each of the devices that it is split over."""
    shape = leaf.shape if leaf.sharding is None else leaf.sharding.shard_shape(leaf.shape)
    return math.prod(shape) * jax.numpy.dtype(leaf.dtype).itemsize
