"""Steps whose loss or gradient is not finite: stop, or skip them up to a bound, and say what their batches held."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from train.data import DataSource


def is_finite(values: Mapping[str, Any]) -> bool:
    """Whether a step's loss, penalty and gradient are finite: what `train_step` decides a skip by."""
    return bool(np.isfinite([values["loss"], values["penalty"], values["grad_norm"]]).all())


def sources(data: DataSource, step: int) -> list[list[str]]:
    """For each row of a step's batch, where its examples came from ("file:line"). step: from 0."""
    return [[data.examples[index].source for index in row] for row in data.row_members(step)]


def describe(step: int, values: Mapping[str, Any], rows: list[list[str]]) -> str:
    """What happened at a step (from 1), and the first examples of its batch."""
    shown = "; ".join(
        f"row {row}: {', '.join(members[:3])}{', ...' * (len(members) > 3)}"
        for row, members in list(enumerate(rows))[:4]
    )
    more = "; ..." if len(rows) > 4 else ""
    return (
        f"step {step}: the loss is {values['loss']}, the penalty {values['penalty']}, the gradient's norm "
        f"{values['grad_norm']}. Its batch held {shown}{more} (all of it: 'examples' of that step in metrics.jsonl)"
    )
