"""Joint LoRA and post-block steering of Llama-3.1-8B-Instruct on your own conversations (orthogonality penalty).

Batches of 64 rows of 2,048 tokens.
"""

from common import chat_tuning

from train.config import TrainConfig


def config() -> TrainConfig:
    return chat_tuning("llama3_8b", "meta-llama/Llama-3.1-8B-Instruct", "joint")
