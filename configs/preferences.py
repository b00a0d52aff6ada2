"""Your own preferences: `jaxsteer dpo preferences --task.train pairs.jsonl --model ...`; docs/preferences.md."""

from train.config.dpo import DpoConfig
from train.tasks import PreferenceTask


def config() -> DpoConfig:
    return DpoConfig(task=PreferenceTask("pairs.jsonl"), out="runs/preferences")
