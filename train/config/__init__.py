"""The settings of training runs: a dataclass for each kind of run, and which of them a file holds."""

from train.config.kinds import KINDS, parse_run, plain_run, program_of
from train.config.run import (
    TO_BE_RESUMED,
    Tracking,
    TrainConfig,
    changeable,
    changeable_settings,
    operational,
    parse_steps,
)

__all__ = [
    "KINDS",
    "TO_BE_RESUMED",
    "Tracking",
    "TrainConfig",
    "changeable",
    "changeable_settings",
    "operational",
    "parse_run",
    "parse_steps",
    "plain_run",
    "program_of",
]
