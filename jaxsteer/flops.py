"""Arithmetic of a training step, counted analytically (a compiler's own count visits a loop's body once)."""

from __future__ import annotations

from typing import NamedTuple

from jaxsteer.models.config import ModelConfig, projections_of, site_dims
from jaxsteer.models.transformer import Model


class StepFlops(NamedTuple):
    """Floating-point operations of one training step.

    useful    forward and backward; of a frozen weight only the derivative in its input (4 a weight and token)
    executed  with what rematerialisation computes again
    """

    useful: float
    executed: float


def block_weights(config: ModelConfig) -> int:
    """Weights of one block's projections."""
    return sum(site_dims(config, site).x[0] * site_dims(config, site).y[0] for site in projections_of(config))


def step_flops(model: Model, rows: int, length: int, supervised: int, *, causal_share: float = 1.0) -> StepFlops:
    """Count a step on [rows, length] tokens of which `supervised` meet the vocabulary.

    Args:
        model: its plan and train_base decide which layers have a backward pass and which weights a gradient; steering
            itself (a few thousandths) is left out.
        causal_share: share of the score matrix that is computed; 1 = all of it, 1/2 at the least.
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
    """Count decoding `new_tokens` after prompts of `prompt` tokens in `rows` rows, with a cache; steering left out.

    Attention is counted over all slots of the cache, as it is computed.
    """
    slots, steps = prompt + new_tokens - 1, new_tokens - 1
    tokens = rows * (prompt + steps)
    scores = 4.0 * tokens * slots * config.heads * config.head_dim
    head = 2.0 * config.width * config.vocab_size * rows * new_tokens
    total = config.layers * (2.0 * block_weights(config) * tokens + scores) + head
    return StepFlops(total, total)
