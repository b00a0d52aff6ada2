"""Joint LoRA and post-block steering of Mistral-7B-Instruct-v0.3 on your own conversations (orthogonality penalty).

Batches of 64 rows of 2,048 tokens.
"""

from common import chat_tuning

from train.config import TrainConfig


def config() -> TrainConfig:
    return chat_tuning("mistral_7b", "mistralai/Mistral-7B-Instruct-v0.3", "joint")
