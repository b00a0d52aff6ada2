"""GRPO on ListOps: post-block steering of SmolLM2-135M-Instruct, rewarded for the right digit."""

from jaxsteer.optim import OptimConfig
from train.config.grpo import GrpoConfig
from train.data import ListOps
from train.tasks import ListOpsTask


def config() -> GrpoConfig:
    return GrpoConfig(
        model="smollm2-135m-instruct",
        task=ListOpsTask(
            ListOps(operations=("MAX", "MIN", "MED", "SM", "FIRST", "LAST"), max_length=10), max_new_tokens=3
        ),
        plan=("nonlinear(rank=8) @ block",),
        optim=OptimConfig(lr=5e-4, schedule="constant", warmup=0.05),
        steps=100,
        prompts=32,
        group=8,
        batch_size=2,
        sequence_length=256,
        evaluate_every=25,
        validation_examples=64,
        test_examples=512,
        eval_batch_size=256,
        checkpoint_every=25,
        out="runs/grpo_listops",
    )
