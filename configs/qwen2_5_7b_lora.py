"""LoRA fine-tuning of Qwen2.5-7B-Instruct on your own conversations, 64 rows of 2,048 tokens per batch."""

from common import chat_tuning

from train.config import TrainConfig


def config() -> TrainConfig:
    return chat_tuning("qwen2_5_7b", "Qwen/Qwen2.5-7B-Instruct", "lora")
