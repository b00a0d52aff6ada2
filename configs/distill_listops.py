"""Context distillation on ListOps: eight worked examples in the prompt become post-block steering."""

from jaxsteer.optim import OptimConfig
from train.config.distill import DistillConfig, Teacher
from train.data import ListOps
from train.tasks import ListOpsTask


def config() -> DistillConfig:
    return DistillConfig(
        model="smollm2-135m-instruct",
        task=ListOpsTask(ListOps(operations=("MAX", "MIN", "MED", "SM", "FIRST", "LAST"), max_length=10)),
        teacher=Teacher(shots=8),
        plan=("nonlinear(rank=8) @ block",),
        optim=OptimConfig(lr=2e-3, schedule="cosine", warmup=0.05),
        steps=60,
        batch_size=4,
        sequence_length=256,
        evaluate_every=15,
        validation_examples=64,
        test_examples=512,
        checkpoint_every=30,
        out="runs/distill_listops",
    )
