"""The LoRA run of docs/theory.md. All weights instead: `--plan --train-base --optim.lr 1e-4`."""

from jaxsteer.optim import OptimConfig
from train.config import TrainConfig
from train.data import ListOps
from train.tasks import ListOpsTask


def config() -> TrainConfig:
    problems = ListOps(
        operations=("MAX", "MIN", "MED", "SM", "FIRST", "LAST"),
        max_length=8,
        train=1500,
        validation=250,
        test=500,
        style="compact",
    )
    return TrainConfig(
        model="smollm2-135m-instruct",
        task=ListOpsTask(problems),
        plan=("lora(rank=8) @ projections",),
        optim=OptimConfig(lr=6e-3, schedule="cosine", warmup=0.05),
        batch_size=2,
        sequence_length=96,
        eval_batch_size=128,
        test_examples=500,
        checkpoint_every=1000,
        out="runs/theory/lora",
    )
