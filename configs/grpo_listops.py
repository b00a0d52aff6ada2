"""GRPO on ListOps: post-block steering of SmolLM2-135M-Instruct, rewarded for the right digit."""

from jaxsteer.optim import OptimConfig
from train.config.grpo import GrpoConfig, PolicyLoss
from train.data import ListOps
from train.tasks import ListOpsTask


def config() -> GrpoConfig:
    problems = ListOps(operations=("MAX", "MIN", "MED", "SM", "FIRST", "LAST"), max_length=10)
    return GrpoConfig(
        model="smollm2-135m-instruct",
        task=ListOpsTask(problems, max_new_tokens=1),  # an answer is one digit
        plan=("nonlinear(rank=8) @ block",),
        optim=OptimConfig(lr=2e-3, schedule="cosine", warmup=0.05),
        policy=PolicyLoss(beta=0.05),  # against a collapse onto the first digit
        steps=40,
        prompts=64,
        group=16,
        batch_size=4,
        sequence_length=256,
        evaluate_every=20,
        validation_examples=256,
        test_examples=512,
        eval_batch_size=256,
        checkpoint_every=10,
        out="runs/grpo_listops",
    )
