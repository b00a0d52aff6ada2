"""Your own prompts and completions: give --task.train (and --task.validation, --task.test)."""

from jaxsteer.optim import OptimConfig
from train.config import TrainConfig
from train.tasks import JsonlTask


def config() -> TrainConfig:
    return TrainConfig(
        task=JsonlTask(train="train.jsonl"),
        plan=("nonlinear(rank=8) @ block",),
        optim=OptimConfig(lr=2e-3, schedule="cosine"),
        epochs=3,
        batch_size=8,
        sequence_length=512,
        out="runs/jsonl",
    )
