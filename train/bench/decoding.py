"""Benchmark of decoding with and without steering."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass
from typing import Any, Literal

import jax
import numpy as np

from jaxsteer.inference.generate import generate
from jaxsteer.models.transformer import Model
from jaxsteer.plans import parse_plan
from jaxsteer.steering import init_steering
from jaxsteer.types import Steering
from train.base_models import load
from train.bench.training import _device
from train.data import TokenizedExample, stack_rows


@dataclass(frozen=True)
class DecodeBench:
    """What steering costs when serving: latency of a token and memory, steered against the base model."""

    model: str = "smollm2-135m-instruct"
    """A local folder or .gguf file, a Hugging Face id, or smollm2-135m-instruct."""
    plan: tuple[str, ...] = ("nonlinear(rank=8) @ block",)
    """What is steered where."""
    batch_size: int = 1
    """Prompts decoded at a time."""
    prompt: int = 32
    """Tokens of a prompt."""
    new_tokens: int = 64
    """Tokens to decode."""
    repeats: int = 7
    """Interleaved pairs of runs; medians count."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of the weights and the compute."""
    json: str | None = None
    """Write the figures to this file."""


def bench_decode(config: DecodeBench) -> dict[str, float]:
    """Run the decoding benchmark and return its figures."""
    loaded = load(config.model, config.dtype)
    plan = parse_plan(config.plan, loaded.config)
    # Not the fresh initialisation, whose zeros a compiler could not know but a cache might like.
    steering = jax.tree.map(lambda x: x + 0.01, init_steering(plan, loaded.config, jax.random.key(0), base=loaded.base))
    tokens = np.random.default_rng(0).integers(0, loaded.config.vocab_size, (config.batch_size, config.prompt))
    row = [[TokenizedExample(t.astype(np.int32), np.zeros(config.prompt, bool), config.prompt, "")] for t in tokens]
    prompts = _device(stack_rows(row, config.prompt))

    def seconds(model: Model, params: Steering, new_tokens: int) -> float:
        began = time.perf_counter()
        run = generate(model, loaded.base, params, prompts, max_new_tokens=new_tokens, stop_tokens=(-1,))
        jax.block_until_ready(run)
        return time.perf_counter() - began

    variants = {"base": (Model(loaded.config), {}), "steered": (Model(loaded.config, plan), steering)}
    times: dict[str, list[float]] = {name: [] for name in variants}
    for repeat in range(config.repeats + 1):
        for name, (model, params) in variants.items():
            # The difference of two lengths leaves the prefill out.
            whole, short = seconds(model, params, config.new_tokens + 1), seconds(model, params, 1)
            if repeat:  # the first compiles
                times[name].append((whole - short) / config.new_tokens)
    memory: dict[str, Any] = {
        name: generate.lower(
            model, loaded.base, params, prompts, max_new_tokens=config.new_tokens + 1, stop_tokens=(-1,)
        )
        .compile()
        .memory_analysis()
        for name, (model, params) in variants.items()
    }
    used = {name: m.argument_size_in_bytes + m.temp_size_in_bytes for name, m in memory.items()}
    base, steered = (statistics.median(times[name]) for name in variants)
    ratios = [s / b for b, s in zip(times["base"], times["steered"], strict=True)]
    return {
        "base, ms a token": 1e3 * base,
        "steered, ms a token": 1e3 * steered,
        "steered / base, latency": statistics.median(ratios),
        "base, GB": used["base"] / 1e9,
        "steered, GB": used["steered"] / 1e9,
        "steered / base, memory": used["steered"] / used["base"],
    }
