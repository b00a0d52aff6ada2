"""LoRA fine-tuning of Mistral-7B-Instruct-v0.3 on your own conversations, 64 rows of 2,048 tokens per batch."""

from common import chat_tuning

from train.config import TrainConfig


def config() -> TrainConfig:
    return chat_tuning("mistral_7b", "mistralai/Mistral-7B-Instruct-v0.3", "lora")
