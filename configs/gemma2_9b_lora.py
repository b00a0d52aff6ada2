"""LoRA of Gemma-2-9B-it on your own data, 64 rows of 2,048 tokens."""

from train.config import TrainConfig
from train.presets import chat_tuning


def config() -> TrainConfig:
    return chat_tuning("gemma2_9b", "google/gemma-2-9b-it", "lora")
