"""Shared settings of the configs for large instruction-tuned models."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from jaxsteer.optim import OptimConfig
from train.config import TrainConfig
from train.tasks import JsonlTask

Method = Literal["post_block", "lora", "joint"]

STEERING, LORA = "nonlinear(rank=8) @ block", "lora(rank=8) @ projections"
_PLANS: dict[Method, tuple[str, ...]] = {"post_block": (STEERING,), "lora": (LORA,), "joint": (LORA, STEERING)}
_OPTIM: dict[Method, OptimConfig] = {
    "post_block": OptimConfig(lr=2e-3),
    "lora": OptimConfig(lr=2e-4),
    "joint": OptimConfig(lr=2e-3, weights_lr=2e-4),
}


def chat_tuning(name: str, model: str, method: Method, *, batch_size: int = 64) -> TrainConfig:
    """Three epochs of your own conversations (train.jsonl, see --task.train) in packed rows of 2,048 tokens.

    Args:
        name: the model's name in the output folder.
        model: the model's id on the hub.
        method: post-block steering, LoRA, or both, kept orthogonal by a penalty.
        batch_size: rows per batch.
    """
    return TrainConfig(
        model=model,
        task=JsonlTask(train="train.jsonl", chat=True, max_new_tokens=256),
        plan=_PLANS[method],
        optim=replace(_OPTIM[method], schedule="cosine", warmup=0.05),
        epochs=3,
        batch_size=batch_size,
        sequence_length=2048,
        dtype="bfloat16",
        remat="full",
        eval_batch_size=64,
        out=f"runs/{name}_{method}",
    )
