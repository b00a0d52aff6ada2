"""The stage decode: greedy decoding of an 8B model, plain and steered, against the bound of the memory's bandwidth."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from jaxsteer.models.transformer import Model, Network
from jaxsteer.plans import parse_plan
from jaxsteer.steering import init_steering
from jaxsteer.types import PyTree
from train.bench.accelerator.inputs import random_base
from train.bench.accelerator.records import Context, Figures, Row, Stage
from train.bench.accelerator.settings import POST_BLOCK, AcceleratorBench, Shapes
from train.bench.decoding import Timed, random_prompts, seconds_of
from train.devices.chips import chip_of
from train.devices.machine import peak_memory_bytes


def bytes_per_token(shapes: Shapes, base: PyTree, size: int) -> float:
    """Bytes that a decoding step must read: every weight but the input embedding once, and the cache as it is filled.

    Args:
        shapes: of the model, the prompt and the answer.
        base: the weights.
        size: prompts decoded at a time.
    """
    config, itemsize = shapes.model, jnp.dtype(shapes.dtype).itemsize
    read = {name: part for name, part in base.items() if name != "embed" or config.tied_head}
    weights = sum(leaf.nbytes for leaf in jax.tree.leaves(read))
    filled = shapes.prompt + shapes.new_tokens / 2  # tokens of a row, halfway
    return weights + 2 * config.layers * size * filled * config.kv_heads * config.head_dim * itemsize


def _measure(size: int, context: Context) -> Figures:
    shapes = context.config.shapes
    base = random_base(shapes.model, shapes.dtype)
    plan = parse_plan(POST_BLOCK, shapes.model)
    steering = jax.tree.map(lambda x: x + 0.01, init_steering(plan, shapes.model, jax.random.key(0), base=base))
    networks = {
        "plain": Network(Model(shapes.model), base, {}),
        "steered": Network(Model(shapes.model, plan), base, steering),
    }
    prompts = random_prompts(size, shapes.prompt, shapes.model.vocab_size)
    times: dict[str, list[float]] = {name: [] for name in networks}
    for repeat in range(context.config.steps + 1):
        for name, network in networks.items():
            seconds = seconds_of(Timed(network), prompts, shapes.new_tokens).token
            if repeat:  # the first compiles
                times[name].append(seconds)
    ratios = [b / a for a, b in zip(times["plain"], times["steered"], strict=True)]
    chip = chip_of(jax.devices()[0].device_kind)
    bound = None if chip is None else bytes_per_token(shapes, base, size) / chip.bandwidth
    figures: dict[str, Any] = {}
    for name, each in times.items():
        seconds = statistics.median(each)
        figures[f"{name}, tokens/s"] = size / seconds
        figures[f"{name}, ms a step"] = 1e3 * seconds
        figures[f"{name}, share of the bandwidth's bound, %"] = None if bound is None else 100 * bound / seconds
    return figures | {
        "steered / plain, time": statistics.median(ratios),
        "peak memory, GB": peak_memory_bytes() / 1e9,
    }


def rows(config: AcceleratorBench, records: Sequence[Any]) -> list[Row]:
    """Each number of prompts."""
    shapes = config.shapes
    settings = {"prompt": shapes.prompt, "new_tokens": shapes.new_tokens, "repeats": config.steps}
    return [
        Row(
            f"{size} prompt{'s' * (size > 1)}",
            partial(_measure, size),
            settings | {"rows": size, "small": config.small},
            seconds=90.0,
            family="decode",
            size=size,
        )
        for size in shapes.decoding
    ]


STAGE = Stage("decode", "greedy decoding, plain and steered, against the bound of the memory's bandwidth", rows)
