"""LoRA fine-tuning of Llama-3.1-70B-Instruct on your own conversations, 128 rows of 2,048 tokens per batch."""

from common import chat_tuning

from train.config import TrainConfig


def config() -> TrainConfig:
    return chat_tuning("llama3_70b", "meta-llama/Llama-3.1-70B-Instruct", "lora", batch_size=128)
