"""DPO on ListOps: pairs of the right digit and a wrong one, post-block steering of SmolLM2-135M-Instruct."""

from jaxsteer.optim import OptimConfig
from train.config.dpo import DpoConfig
from train.data import ListOps
from train.tasks import ListOpsTask, PairedTask


def config() -> DpoConfig:
    return DpoConfig(
        model="smollm2-135m-instruct",
        task=PairedTask(ListOpsTask(ListOps(operations=("MAX", "MIN", "MED", "SM", "FIRST", "LAST"), max_length=10))),
        plan=("nonlinear(rank=8) @ block",),
        optim=OptimConfig(lr=2e-3, schedule="cosine", warmup=0.05),
        steps=60,
        batch_size=4,
        sequence_length=256,
        evaluate_every=15,
        validation_examples=256,
        test_examples=512,
        checkpoint_every=30,
        out="runs/dpo_listops",
    )
