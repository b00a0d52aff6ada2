"""What no implementation can avoid, and how long that takes at least at the speeds measured on this machine."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxsteer.flops import block_weights, step_flops
from jaxsteer.models.config import ModelConfig
from jaxsteer.models.transformer import Model
from train.devices.machine import matmul_peak_flops

FP32_BYTES = 4


class Roof(NamedTuple):
    """Measured speeds of the machine: fp32 matmuls in FLOP/s, and reading memory in bytes/s."""

    flops: float
    bandwidth: float


@dataclass(frozen=True)
class Needed:
    """Floating-point operations of the matmuls, and bytes that must be read from memory, of some work."""

    flops: float
    bytes: float

    def seconds(self, roof: Roof) -> float:
        """The least time that it takes."""
        return max(self.flops / roof.flops, self.bytes / roof.bandwidth)

    def limit(self, roof: Roof) -> str:
        """What takes that long."""
        return "arithmetic" if self.flops / roof.flops >= self.bytes / roof.bandwidth else "memory"


def measure_roof() -> Roof:
    """The machine's speeds now: others may be using it."""
    return Roof(matmul_peak_flops(jnp.float32), _bandwidth())


def _bandwidth(size: int = 1 << 26, repeats: int = 5) -> float:
    """Bytes per second of the product of a matrix that no cache holds with a vector, which reads it once."""
    product = jax.jit(jnp.matmul)
    matrix, vector = jnp.ones((size // 8192, 8192)), jnp.ones(8192)
    product(matrix, vector).block_until_ready()
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        product(matrix, vector).block_until_ready()
        times.append(time.perf_counter() - began)
    return matrix.nbytes / statistics.median(times)


def training_needs(model: Model, examples: Iterable[Sequence[bool]], steps: int) -> Needed:
    """What training on examples needs, without padding, masked attention scores and recomputation.

    The steering itself is left out, as in `step_flops`.

    Args:
        model: its plan decides what has gradients.
        examples: for each example, which of its tokens are targets.
        steps: number of updates.
    """
    lengths, supervised = [], 0
    for targets in examples:
        lengths.append(len(targets))
        supervised += sum(targets[1:])
    tokens, pairs = sum(lengths), sum(n * (n + 1) / 2 for n in lengths)
    flops = step_flops(model, tokens, 1, supervised, causal_share=pairs / tokens).useful
    passes = 3 if model.train_base else 2
    return Needed(flops, passes * steps * _weight_bytes(model.config))


def decoding_needs(config: ModelConfig, prompts: Sequence[int], new_tokens: int, rows: int) -> Needed:
    """What greedy decoding with a cache needs: every step reads all weights once and the cache of its rows.

    Args:
        config: the model's config.
        prompts: length of each prompt.
        new_tokens: tokens generated after each.
        rows: number of prompts decoded at a time.
    """
    lengths = [prompt + new_tokens - 1 for prompt in prompts]
    pairs = sum(n * (n + 1) / 2 for n in lengths)
    blocks = config.layers * (2.0 * block_weights(config) * sum(lengths) + 4.0 * pairs * config.heads * config.head_dim)
    head = 2.0 * config.width * config.vocab_size * new_tokens * len(prompts)
    slot = 2.0 * FP32_BYTES * config.layers * config.kv_heads * config.head_dim  # a token's keys and values
    cached = sum(n * (n + 1) / 2 - p * (p + 1) / 2 for n, p in zip(lengths, prompts, strict=True))
    steps = new_tokens * -(-len(prompts) // rows)
    return Needed(blocks + head, steps * _weight_bytes(config) + slot * cached)


def _weight_bytes(config: ModelConfig) -> float:
    """Bytes of the fp32 weights that a forward pass reads."""
    return FP32_BYTES * (config.layers * block_weights(config) + config.width * config.vocab_size)
