"""Where the numbers of a run are shown besides metrics.jsonl: TensorBoard and Weights & Biases, both optional."""

from __future__ import annotations

import importlib.util
import math
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from train.config import Kind

_PACKAGES = {"tensorboard": "tensorboardX", "wandb": "wandb"}


class Tracker(Protocol):
    """Takes the numbers of a step."""

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Show the numbers of a step."""

    def close(self) -> None:
        """Finish what is under way."""


class TensorBoard:
    """Event files in a folder. On resuming, TensorBoard drops what it saw of the steps that come again.

    Args:
        folder: of the event files.
        resume_at: the step that the run goes on at; None for a new run.
    """

    def __init__(self, folder: Path, resume_at: int | None) -> None:
        from tensorboardX import SummaryWriter

        purge = None if resume_at is None else resume_at + 1
        # A file is named by the second that it is made in: one of a run resumed at once would replace the first.
        suffix = "" if purge is None else f".{purge}"
        self._writer = SummaryWriter(str(folder), purge_step=purge, flush_secs=10, filename_suffix=suffix)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Add a point to the curve of each number."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Write what is still in memory."""
        self._writer.close()


class WandB:
    """A run of Weights & Biases; its id is kept in the run's folder, so that a resumed run goes on as the same one.

    W&B refuses steps that it has already: those that come again are not shown twice. Project, account and offline mode
    are set by W&B's own environment variables (WANDB_PROJECT, WANDB_MODE, ...).
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any]) -> None:
        import wandb

        file = folder / "wandb_id"
        if not file.exists():
            file.write_text(uuid.uuid4().hex[:12])
        self._run = wandb.init(
            id=file.read_text().strip(), resume="allow", dir=str(folder), name=folder.name, config=dict(settings)
        )

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Log the numbers of a step."""
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        """Finish the run, sending what is left."""
        self._run.finish()


def check_trackers(kinds: Sequence[Kind]) -> None:
    """Raise ValueError where a tracker's package is missing, before anything is made."""
    for kind in kinds:
        if importlib.util.find_spec(_PACKAGES[kind]) is None:
            raise ValueError(
                f"track {kind}: the package {_PACKAGES[kind]} is not installed; "
                f"install the extra: pip install -e '.[train,{kind}]', or leave {kind} out of --track"
            )


def open_trackers(
    kinds: Sequence[Kind], folder: Path, settings: Mapping[str, Any], *, resume_at: int | None
) -> list[Tracker]:
    """The trackers of a run, on the process that writes its files.

    Args:
        kinds: which.
        folder: of the run.
        settings: of the run, shown beside it.
        resume_at: the step that the run goes on at; None for a new run.
    """
    make: dict[Kind, Callable[[], Tracker]] = {
        "tensorboard": lambda: TensorBoard(folder / "tensorboard", resume_at),
        "wandb": lambda: WandB(folder, settings),
    }
    return [make[kind]() for kind in dict.fromkeys(kinds)]


def numbers(values: Mapping[str, Any]) -> dict[str, float]:
    """What can be drawn of a line of metrics: numbers, and lists of numbers by their mean."""
    found = {}
    for name, value in values.items():
        several = value if isinstance(value, (list, tuple)) else [value]
        if several and all(isinstance(each, (bool, int, float)) for each in several):
            found[name] = math.fsum(several) / len(several) if all(map(math.isfinite, several)) else math.nan
    return found
