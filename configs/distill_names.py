"""Context distillation: eight worked examples of how to write a name become post-block steering."""

from jaxsteer.optim import OptimConfig
from train.config.distill import DistillConfig, Teacher
from train.tasks import JsonlTask


def config() -> DistillConfig:
    return DistillConfig(
        model="smollm2-135m-instruct",
        task=JsonlTask(
            "names_train.jsonl",
            validation="names_validation.jsonl",
            test="names_test.jsonl",
            chat=True,
            max_new_tokens=12,
        ),
        teacher=Teacher(shots=8),
        plan=("nonlinear(rank=8) @ block",),
        optim=OptimConfig(lr=2e-3, schedule="cosine", warmup=0.05),
        steps=60,
        batch_size=4,
        sequence_length=128,
        evaluate_every=20,
        validation_examples=32,
        test_examples=256,
        checkpoint_every=20,
        out="runs/distill_names",
    )
