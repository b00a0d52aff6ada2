"""Post-block steering of Gemma-2-9B-it on your own conversations, 64 rows of 2,048 tokens per batch."""

from common import chat_tuning

from train.config import TrainConfig


def config() -> TrainConfig:
    return chat_tuning("gemma2_9b", "google/gemma-2-9b-it", "post_block")
