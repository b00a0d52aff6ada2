"""Your own table (.csv, .tsv, .jsonl, .parquet, or a hub id as `data`), with templates for its columns."""

from jaxsteer.optim import OptimConfig
from train.config import TrainConfig
from train.tasks import TableTask


def config() -> TrainConfig:
    return TrainConfig(
        task=TableTask(
            train="train.csv",
            validation="held_out.csv",
            prompt="Review: {text}\nIs it positive or negative?\n",
            completion="{label}",
            choices=("positive", "negative"),
            max_new_tokens=8,
        ),
        plan=("nonlinear(rank=8) @ block",),
        optim=OptimConfig(lr=2e-3, schedule="cosine"),
        epochs=3,
        batch_size=8,
        sequence_length=512,
        on_long="cut",
        out="runs/table",
    )
