"""Post-block steering of SmolLM2-135M-Instruct on everyday conversations, with its chat template."""

from jaxsteer.optim import OptimConfig
from train.config import TrainConfig
from train.tasks import HubTask


def config() -> TrainConfig:
    return TrainConfig(
        model="smollm2-135m-instruct",
        task=HubTask("chat"),
        plan=("nonlinear(rank=8) @ block",),
        optim=OptimConfig(lr=1e-3, schedule="cosine", warmup=0.05),
        epochs=1,
        batch_size=8,
        sequence_length=1024,
        on_long="drop",
        # A conversation has no single right answer to score.
        test_examples=0,
        validation_examples=0,
        out="runs/chat_smollm2",
    )
