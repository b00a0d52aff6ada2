"""The decoding benchmark: latency and memory of one batch, with and without steering."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import jax
import numpy as np

from jaxsteer.inference.generate import generate, to_device
from jaxsteer.models.transformer import Model, Network
from jaxsteer.plans import parse_plan
from jaxsteer.steering import init_steering
from jaxsteer.types import Batch
from train.base_models import check_plan, load
from train.data import TokenizedExample, stack_rows


@dataclass(frozen=True)
class DecodeBench:
    """Measure what steering costs when decoding: latency per token and memory, steered against unsteered."""

    model: str = "smollm2-135m-instruct"
    """Local folder, .gguf file or Hugging Face id of the base model, or smollm2-135m-instruct."""
    plan: tuple[str, ...] = ("nonlinear(rank=8) @ block",)
    """Steering plan: what is steered at which sites."""
    batch_size: int = 1
    """Number of prompts decoded at a time."""
    prompt: int = 32
    """Length of each prompt in tokens."""
    new_tokens: int = 64
    """Number of tokens to generate per prompt."""
    repeats: int = 7
    """Number of interleaved pairs of runs; the medians are reported."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Data type of the weights and the compute; auto: float32 on CPU, bfloat16 on accelerators."""
    json: str | None = None
    """Write the figures to this file."""


def bench_decode(config: DecodeBench) -> dict[str, float]:
    """Run the decoding benchmark and return its figures."""
    check_plan(config.model, config.plan)
    loaded = load(config.model, config.dtype)
    plan = parse_plan(config.plan, loaded.config)
    # Not the initial steering: multiplying by its zeros might be cheaper than what training makes of them.
    steering = jax.tree.map(lambda x: x + 0.01, init_steering(plan, loaded.config, jax.random.key(0), base=loaded.base))
    networks = {
        "base": Network(Model(loaded.config), loaded.base, {}),
        "steered": Network(Model(loaded.config, plan), loaded.base, steering),
    }
    prompts = random_prompts(config.batch_size, config.prompt, loaded.config.vocab_size)
    times: dict[str, list[float]] = {name: [] for name in networks}
    for repeat in range(config.repeats + 1):
        for name, network in networks.items():
            seconds = seconds_per_token(network, prompts, config.new_tokens)
            if repeat:  # the first compiles
                times[name].append(seconds)
    base, steered = (statistics.median(times[name]) for name in networks)
    ratios = [s / b for b, s in zip(times["base"], times["steered"], strict=True)]
    memory = {name: _memory(network, prompts, config.new_tokens) for name, network in networks.items()}
    return {
        "base, ms per token": 1e3 * base,
        "steered, ms per token": 1e3 * steered,
        "steered / base, latency": statistics.median(ratios),
        "base, GB": memory["base"] / 1e9,
        "steered, GB": memory["steered"] / 1e9,
        "steered / base, memory": memory["steered"] / memory["base"],
    }


def random_prompts(batch_size: int, length: int, vocab_size: int) -> Batch:
    """Prompts of random tokens, all of one length, on the default device."""
    tokens = np.random.default_rng(0).integers(0, vocab_size, (batch_size, length)).astype(np.int32)
    no_completion = np.zeros(length, bool)
    return to_device(stack_rows([[TokenizedExample(ids, no_completion, length, "random")] for ids in tokens], length))


def seconds_per_token(network: Network, prompts: Batch, new_tokens: int) -> float:
    """The difference between a long and a short answer, which leaves out the prefill."""

    def seconds(count: int) -> float:
        began = time.perf_counter()
        jax.block_until_ready(_generate(network, prompts, count)())
        return time.perf_counter() - began

    return (seconds(new_tokens + 1) - seconds(1)) / new_tokens


def _memory(network: Network, prompts: Batch, new_tokens: int) -> int:
    """Bytes of the arguments and temporaries of the compiled program."""
    call = _generate(network, prompts, new_tokens + 1)
    memory: Any = generate.lower(*call.args, **call.keywords).compile().memory_analysis()
    return memory.argument_size_in_bytes + memory.temp_size_in_bytes


def _generate(network: Network, prompts: Batch, count: int) -> partial:
    """The call that generates `count` tokens: there is no token -1 to stop at."""
    model, base, steering = network.model, network.base, network.steering
    return partial(generate, model, base, steering, prompts, max_new_tokens=count, stop_tokens=(-1,))
