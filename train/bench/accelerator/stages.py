"""The stages in the order in which they run."""

from __future__ import annotations

from train.bench.accelerator import attention, budgets, decoding, memory, numerics, peft, sweep, training
from train.bench.accelerator.records import Stage

STAGES: tuple[Stage, ...] = (
    numerics.STAGE,
    attention.STAGE,
    training.STAGE,
    peft.STAGE,
    decoding.STAGE,
    sweep.STAGE,
    memory.STAGE,
    budgets.STAGE,
)
