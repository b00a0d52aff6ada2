"""Which command settings belong to: `program` names it in config.json and YAML, for all but supervised fine-tuning."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from train.config.distill import DistillConfig
from train.config.dpo import DpoConfig
from train.config.grpo import GrpoConfig
from train.config.run import TrainConfig
from train.plain import from_plain, to_plain

PROGRAM = "program"

KINDS: dict[str, type[TrainConfig]] = {
    kind.program: kind for kind in (TrainConfig, DpoConfig, GrpoConfig, DistillConfig)
}
"""The settings of each command that trains, by its name."""


def parse_run(data: Any, where: str) -> TrainConfig:
    """A run's settings from plain values, of the command that they name.

    Args:
        data: as `TrainConfig.to_json` or `plain_run` gives them; what is left out has its default.
        where: the file that they come from.

    Raises:
        ValueError: they are those of a command that this version does not have, or of no run.
    """
    if not isinstance(data, Mapping) or PROGRAM not in data:
        return from_plain(TrainConfig, data, where)
    if data[PROGRAM] not in KINDS:
        raise ValueError(f"{where}: {PROGRAM} is {data[PROGRAM]!r}; there are {', '.join(KINDS)}")
    rest = {name: value for name, value in data.items() if name != PROGRAM}
    return from_plain(KINDS[data[PROGRAM]], rest, where)


def plain_run(config: TrainConfig) -> dict[str, Any]:
    """All settings of a run as plain values, for YAML; `parse_run` reads them back."""
    return config.named_program | to_plain(config)


def program_of(data: Mapping[str, Any]) -> str:
    """The command whose settings plain values are; supervised fine-tuning if they name one that there is not."""
    name = data.get(PROGRAM)
    return name if name in KINDS else TrainConfig.program
