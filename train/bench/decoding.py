"""The decoding benchmark: latency and memory of one batch, without steering, with it, and with several adapters."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxsteer.adapters import stack_adapters
from jaxsteer.inference.generate import generate, generate_program, to_device
from jaxsteer.io import LoadedModel
from jaxsteer.models.by_layer import layers_to_decode
from jaxsteer.models.transformer import Model, Network
from jaxsteer.plans import parse_plan
from jaxsteer.ranges import Count, check_ranges
from jaxsteer.steering import init_steering
from jaxsteer.types import Array, Batch, Plan, Steering
from train.base_models import check_plan, load
from train.data import TokenizedExample, stack_rows


@dataclass(frozen=True)
class DecodeBench:
    """Measure what steering costs when decoding: latency per token and memory, steered against unsteered."""

    model: str = "smollm2-135m-instruct"
    """Local folder, .gguf file or Hugging Face id of the base model, or smollm2-135m-instruct."""
    plan: tuple[str, ...] = ("nonlinear(rank=8) @ block",)
    """Steering plan: what is steered at which sites."""
    batch_size: Count = 1
    """Number of prompts decoded at a time."""
    prompt: Count = 32
    """Length of each prompt in tokens."""
    new_tokens: Count = 64
    """Number of tokens to generate per prompt."""
    adapters: Count = 1
    """Number of adapters among which the prompts are dealt out, in turn; from 2 on compared with one, too."""
    repeats: Count = 7
    """Number of interleaved pairs of runs; the medians are reported."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Data type of the weights and the compute; auto: float32 on CPU, bfloat16 on accelerators."""
    json: str | None = None
    """Write the figures to this file."""

    def __post_init__(self) -> None:
        """Reject settings that nothing can be measured with."""
        check_ranges(self)


STOPS = (-1,)
"""There is no such token, so that nothing ends an answer early."""


class Timed(NamedTuple):
    """A model to time, with the adapter of each prompt."""

    network: Network
    adapters: Array | None = None


class Seconds(NamedTuple):
    """Of reading the prompts and drawing a token of each, and of each further token."""

    prefill: float
    token: float


def bench_decode(config: DecodeBench) -> dict[str, float]:
    """Run the decoding benchmark and return its figures."""
    check_plan(config.model, config.plan)
    loaded = load(config.model, config.dtype)
    plan = parse_plan(config.plan, loaded.config)
    model, base = Model(loaded.config, plan), loaded.base
    trees = {str(i): (plan, _steering(plan, loaded, i)) for i in range(config.adapters)}
    timed = {
        "base": Timed(Network(Model(loaded.config), base, {})),
        "steered": Timed(Network(model, base, trees["0"][1])),
    }
    pairs = [("steered", "base")]
    if config.adapters > 1:
        several, stacked = f"{config.adapters} adapters", stack_adapters(trees, loaded.config).steering
        own = jnp.arange(config.batch_size, dtype=jnp.int32) % config.adapters
        timed[several] = Timed(Network(model, base, stacked), own)
        pairs.append((several, "steered"))
    prompts = random_prompts(config.batch_size, config.prompt, loaded.config.vocab_size)
    times: dict[str, list[Seconds]] = {name: [] for name in timed}
    for repeat in range(config.repeats + 1):
        for name, one in timed.items():
            seconds = seconds_of(one, prompts, config.new_tokens)
            if repeat:  # the first compiles
                times[name].append(seconds)
    memory = {name: _memory(one, prompts, config.new_tokens) for name, one in timed.items()}
    figures = {}
    for name in timed:
        figures[f"{name}, ms per token"] = 1e3 * statistics.median(seconds.token for seconds in times[name])
        figures[f"{name}, GB"] = memory[name] / 1e9
    for name, other in pairs:
        ratio = lambda of, a=times[name], b=times[other]: statistics.median(map(lambda x, y: of(x) / of(y), a, b))
        figures[f"{name} / {other}, latency"] = ratio(lambda seconds: seconds.token)
        figures[f"{name} / {other}, prefill"] = ratio(lambda seconds: seconds.prefill)
        figures[f"{name} / {other}, memory"] = memory[name] / memory[other]
    return figures


def _steering(plan: Plan, loaded: LoadedModel, seed: int) -> Steering:
    """Not the initial steering: multiplying by its zeros might be cheaper than what training makes of them."""
    fresh = init_steering(plan, loaded.config, jax.random.key(seed), base=loaded.base)
    return jax.tree.map(lambda x: x + 0.01, fresh)


def random_prompts(batch_size: int, length: int, vocab_size: int) -> Batch:
    """Prompts of random tokens, all of one length, on the default device."""
    tokens = np.random.default_rng(0).integers(0, vocab_size, (batch_size, length)).astype(np.int32)
    no_completion = np.zeros(length, bool)
    return to_device(stack_rows([[TokenizedExample(ids, no_completion, length, "random")] for ids in tokens], length))


def seconds_of(timed: Timed, prompts: Batch, new_tokens: int) -> Seconds:
    """A token takes the difference between a long and a short answer, which leaves out the prefill."""

    def seconds(count: int) -> float:
        began = time.perf_counter()
        jax.block_until_ready(_generate(timed, prompts, count)())
        return time.perf_counter() - began

    longer, prefill = seconds(new_tokens + 1), seconds(1)
    return Seconds(prefill, (longer - prefill) / new_tokens)


def _memory(timed: Timed, prompts: Batch, new_tokens: int) -> int:
    """Bytes of the arguments and temporaries of the compiled program."""
    layers = layers_to_decode(timed.network.base)  # which share the memory of the base tree
    steered = {"adapters": timed.adapters}
    lowered = generate_program.lower(
        timed.network, prompts, jax.random.key(0), layers, steered, max_new_tokens=new_tokens + 1, stop_tokens=STOPS
    )
    memory: Any = lowered.compile().memory_analysis()
    shared = sum(leaf.nbytes for leaf in jax.tree.leaves(layers))
    return memory.argument_size_in_bytes + memory.temp_size_in_bytes - shared


def _generate(timed: Timed, prompts: Batch, count: int) -> partial:
    """The call that generates `count` tokens."""
    model, base, steering = timed.network.model, timed.network.base, timed.network.steering
    settings: Any = {"max_new_tokens": count, "stop_tokens": STOPS, "adapters": timed.adapters}
    return partial(generate, model, base, steering, prompts, **settings)
