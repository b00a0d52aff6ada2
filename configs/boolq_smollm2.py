"""Post-block steering of SmolLM2-135M-Instruct on BoolQ. Offline: --task.train and --task.test."""

from jaxsteer.optim import OptimConfig
from train.config import TrainConfig
from train.tasks import HubTask


def config() -> TrainConfig:
    return TrainConfig(
        model="smollm2-135m-instruct",
        task=HubTask("boolq"),
        plan=("nonlinear(rank=8) @ block",),
        optim=OptimConfig(lr=2e-3, schedule="cosine", warmup=0.05),
        epochs=1,
        batch_size=8,
        sequence_length=512,
        on_long="cut",
        test_examples=1024,
        out="runs/boolq_smollm2",
    )
