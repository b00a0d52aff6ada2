"""Post-block steering of SmolLM2-135M-Instruct on GSM8K, as plain prompts. Offline: --task.data."""

from jaxsteer.optim import OptimConfig
from train.config import TrainConfig
from train.tasks import HubTask


def config() -> TrainConfig:
    return TrainConfig(
        model="smollm2-135m-instruct",
        # SmolLM2 makes a token of every digit: 97 % of the training answers fit into 256 tokens, 38 % into 100.
        task=HubTask("gsm8k", max_new_tokens=256),
        plan=("nonlinear(rank=8) @ block",),
        optim=OptimConfig(lr=2e-3, schedule="cosine", warmup=0.05),
        epochs=3,
        batch_size=8,
        sequence_length=640,
        out="runs/gsm8k_smollm2",
    )
