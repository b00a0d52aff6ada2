"""Comparisons on a small Llama that configs/pretrain_listops.py trains: two operations that it never saw."""

from __future__ import annotations

from collections.abc import Sequence

from jaxsteer.optim import OptimConfig
from train.compare.config import CompareConfig, Contrast, Entry
from train.config import TrainConfig
from train.data import ListOps
from train.tasks import ListOpsTask


def small(out: str, entries: Sequence[Entry], contrasts: Sequence[Contrast] = (), *, seeds: int) -> CompareConfig:
    """A comparison of fine-tuning to the operations MED and FIRST."""
    problems = ListOps(operations=("MED", "FIRST"), max_length=8, style="compact")
    return CompareConfig(
        base=TrainConfig(
            model="runs/pretrain_listops/model",
            task=ListOpsTask(problems),
            optim=OptimConfig(schedule="cosine", warmup=0.05),
            steps=1200,
            batch_size=4,
            sequence_length=128,
            validation_examples=500,
            test_examples=2000,
        ),
        entries=tuple(entries),
        contrasts=tuple(contrasts),
        scoring="predictions",
        neutral="runs/pretrain_listops/neutral.txt",
        seeds=seeds,
        out=out,
    )
