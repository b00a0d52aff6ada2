"""The comparison at matched parameters on a second base model, small enough for twenty seeds."""

from common_matched import CONTRASTS, ENTRIES
from common_small import small

from train.compare.config import CompareConfig


def config() -> CompareConfig:
    return small("runs/compare_small", ENTRIES, CONTRASTS, seeds=20)
