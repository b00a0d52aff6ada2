"""Trackers that a run can log to besides metrics.jsonl: TensorBoard and Weights & Biases, both optional."""

from __future__ import annotations

import importlib.util
import math
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from train.config import Tracking

_PACKAGES = {"tensorboard": "tensorboardX", "wandb": "wandb"}


class Tracker(Protocol):
    """Receives the numbers of each step."""

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Log the numbers of a step."""

    def close(self) -> None:
        """Flush and finish."""


class TensorBoard:
    """Event files in a folder. When a run resumes, TensorBoard purges the steps that will be logged again.

    Args:
        folder: where the event files go.
        resume_from: the first step that a resumed run will log; None for a new run.
    """

    def __init__(self, folder: Path, resume_from: int | None) -> None:
        from tensorboardX import SummaryWriter

        # A file is named by the second of its creation: that of a run resumed at once would replace the first.
        suffix = "" if resume_from is None else f".{resume_from}"
        self._writer = SummaryWriter(str(folder), purge_step=resume_from, flush_secs=10, filename_suffix=suffix)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Add a point to the curve of each number."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Write what is still buffered."""
        self._writer.close()


class WandB:
    """A Weights & Biases run; its id is kept in the run's folder, so that a resumed run continues it.

    W&B refuses steps that it already has, so repeated steps do not show twice. Project, account and offline mode are
    set by W&B's own environment variables (WANDB_PROJECT, WANDB_MODE, ...).
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any]) -> None:
        import wandb

        file = folder / "wandb_id"
        if not file.exists():
            file.write_text(uuid.uuid4().hex[:12], encoding="utf-8")
        self._run = wandb.init(
            id=file.read_text(encoding="utf-8").strip(),
            resume="allow",
            dir=str(folder),
            name=folder.name,
            config=dict(settings),
        )

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Log the numbers of a step."""
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        """Send what is left and finish the run."""
        self._run.finish()


def check_trackers(kinds: Sequence[Tracking]) -> None:
    """Raise ValueError if a tracker's package is missing, before anything is created."""
    for kind in kinds:
        if importlib.util.find_spec(_PACKAGES[kind]) is None:
            raise ValueError(
                f"track {kind}: the package {_PACKAGES[kind]} is not installed; "
                f'install the extra: pip install "jaxsteer[train,{kind}]", or leave {kind} out of --track'
            )


def open_trackers(
    kinds: Sequence[Tracking], folder: Path, settings: Mapping[str, Any], *, resume_from: int | None
) -> list[Tracker]:
    """The trackers of a run, opened on the process that writes its files.

    Args:
        kinds: which ones.
        folder: the run's folder.
        settings: the run's settings, shown beside its curves.
        resume_from: the first step that a resumed run will log; None for a new run.
    """
    make: dict[Tracking, Callable[[], Tracker]] = {
        "tensorboard": lambda: TensorBoard(folder / "tensorboard", resume_from),
        "wandb": lambda: WandB(folder, settings),
    }
    return [make[kind]() for kind in dict.fromkeys(kinds)]


def numbers(values: Mapping[str, Any]) -> dict[str, float]:
    """The values of a line of metrics that can be plotted: numbers, and the means of lists of numbers."""
    plotted = {}
    for name, value in values.items():
        items = value if isinstance(value, (list, tuple)) else [value]
        if items and all(isinstance(item, (bool, int, float)) for item in items):
            plotted[name] = math.fsum(items) / len(items) if all(map(math.isfinite, items)) else math.nan
    return plotted
