"""Running out of device memory, in words: what was being computed, and which settings make it smaller."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import jax

from train.config import TrainConfig

What = Literal["step", "evaluation"]


@contextmanager
def enough_memory(config: TrainConfig, what: What) -> Iterator[None]:
    """Turn the runtime's RESOURCE_EXHAUSTED into advice.

    Raises:
        ValueError: the devices ran out of memory.
    """
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise ValueError(f"out of memory: {_advice(config, what)} ({_asked(str(error))})") from error


def _advice(config: TrainConfig, what: What) -> str:
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
