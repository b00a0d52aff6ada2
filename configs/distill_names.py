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
            template="{prompt} ->",
            rule="tagged",
            max_new_tokens=16,
        ),
        teacher=Teacher(shots=8),
        plan=("nonlinear(rank=8) @ block",),
        optim=OptimConfig(lr=5e-3, schedule="cosine", warmup=0.05),
        steps=40,
        batch_size=2,
        sequence_length=128,
        evaluate_every=20,
        validation_examples=32,
        test_examples=200,
        checkpoint_every=20,
        out="runs/distill_names",
    )
