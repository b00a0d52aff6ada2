"""FLOPs of training and decoding, counted analytically: the compiler's own count visits a loop body only once."""

from __future__ import annotations

from typing import NamedTuple

from jaxsteer.models.config import ModelConfig, projections_of, site_dims
from jaxsteer.models.transformer import Model


class StepFlops(NamedTuple):
    """Floating-point operations of one step.

    useful    forward and backward pass; for a frozen weight, only the gradient of its input (4 per weight and token)
    executed  including what rematerialisation recomputes
    """

    useful: float
    executed: float


def block_weights(config: ModelConfig) -> int:
    """Number of weights in one block's projections."""
    return sum(site_dims(config, site).x[0] * site_dims(config, site).y[0] for site in projections_of(config))


def step_flops(model: Model, rows: int, length: int, supervised: int, *, causal_share: float = 1.0) -> StepFlops:
    """Count one training step. The steering itself (a few thousandths of the total) is left out.

    Args:
        model: its plan and `train_base` decide which layers have a backward pass and which weights have gradients.
        rows: rows of the batch.
        length: tokens per row.
        supervised: number of tokens for which logits are computed.
        causal_share: fraction of the attention scores that is computed, from 1/2 (causal) to 1 (all).
    """
    config, tokens = model.config, rows * length
    L = config.layers
    first = min((layer for slot in model.plan for layer in slot.active_layers(L)), default=0)
    backward = L if model.train_base else L - first
    weights = block_weights(config)
    scores = 4.0 * tokens * length * config.heads * config.head_dim * causal_share  # q kᵀ and · v, one layer
    head = 2.0 * config.width * config.vocab_size * supervised
    trained = 1.0 if model.train_base else 0.0

    forward = L * (2.0 * weights * tokens + scores) + head
    useful = forward + backward * (2.0 * (1 + trained) * weights * tokens + 2 * scores) + (1 + trained) * head
    again = {"none": 0.0, "selective": scores, "full": 2.0 * weights * tokens + 2 * scores}[model.remat]
    return StepFlops(useful, useful + backward * again + trained * head)


def decode_flops(config: ModelConfig, rows: int, prompt: int, new_tokens: int) -> StepFlops:
    """Count decoding with a KV cache. Attention runs over the whole cache and is counted so; steering is left out.

    Args:
        config: the model's config.
        rows: rows of the batch.
        prompt: tokens per prompt.
        new_tokens: tokens generated per row.
    """
    slots, steps = prompt + new_tokens - 1, new_tokens - 1
    tokens = rows * (prompt + steps)
    scores = 4.0 * tokens * slots * config.heads * config.head_dim
    head = 2.0 * config.width * config.vocab_size * rows * new_tokens
    total = config.layers * (2.0 * block_weights(config) * tokens + scores) + head
    return StepFlops(total, total)
