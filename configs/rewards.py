"""Your own questions and rewards: `jaxsteer grpo rewards --task.train my.jsonl --rewards mine.py:good`."""

from train.config.grpo import GrpoConfig
from train.tasks import JsonlTask


def config() -> GrpoConfig:
    return GrpoConfig(task=JsonlTask(train="train.jsonl"), sequence_length=512, out="runs/rewards")
