"""Pretraining of a small Llama on four of ListOps' operations, a base for configs/compare_small.py.

The model: `jaxsteer create models/listops --layers 4 --width 128 --max-length 256`.
"""

from jaxsteer.optim import OptimConfig
from train.config import TrainConfig
from train.data import ListOps
from train.tasks import ListOpsTask

SEEN = ("MAX", "MIN", "SM", "LAST")


def config() -> TrainConfig:
    problems = ListOps(operations=SEEN, max_length=8, style="compact", train=300_000)
    return TrainConfig(
        model="models/listops",
        task=ListOpsTask(problems, max_new_tokens=1),
        plan=(),
        train_base=True,
        optim=OptimConfig(lr=2e-3, schedule="cosine", warmup=0.02),
        steps=1500,
        batch_size=32,
        sequence_length=128,
        loss_on="all",
        evaluate_every=300,
        validation_examples=500,
        test_examples=2000,
        eval_batch_size=256,
        checkpoint_every=250,
        out="runs/pretrain_listops",
    )
