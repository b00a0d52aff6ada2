"""The table of what is measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

from jaxsteer.plans import did_you_mean
from train.bench.against.arena import Arena
from train.bench.against.contest import Better, Contest
from train.bench.against.training import TrainingRow

STEERING, LORA = "nonlinear(rank=8) @ block", "lora(rank=8, alpha=8) @ projections"
POST_BLOCK_ASKED: Mapping[str, Any] = {"method": "post-block", "rank": 8, "alpha": 1.0}
LORA_ASKED: Mapping[str, Any] = {"method": "lora", "rank": 8, "alpha": 8.0}
FULL_ASKED: Mapping[str, Any] = {"method": "full", "rank": 0, "alpha": 0.0}
STRONG = ("packed", "flattened", "grouped")


class Row(Protocol):
    """What is measured: what runs on our side, what the peer is asked, and the figure."""

    @property
    def name(self) -> str:
        """For --rows, and in the file."""
        ...

    @property
    def group(self) -> str:
        """For --rows."""
        ...

    @property
    def title(self) -> str:
        """For the table."""
        ...

    @property
    def unit(self) -> str:
        """Of the figure."""
        ...

    @property
    def better(self) -> Better:
        """Which of two figures is the better one."""
        ...

    def contest(self, arena: Arena) -> AbstractContextManager[Contest]:
        """Both sides, compared before they are measured.

        Raises:
            ValueError: they do not do the same work, or the peer failed.
        """
        ...


ROWS: tuple[Row, ...] = (
    TrainingRow(
        "post-block-gsm8k",
        "training",
        "Post-block, GSM8K",
        (STEERING,),
        POST_BLOCK_ASKED,
        "PyTorch hooks",
        "gsm8k",
        ("padded",),
    ),
    TrainingRow(
        "post-block-boolq",
        "training",
        "Post-block, BoolQ questions",
        (STEERING,),
        POST_BLOCK_ASKED,
        "PyTorch hooks",
        "boolq",
        ("padded",),
    ),
    TrainingRow("lora-gsm8k", "training", "LoRA, GSM8K", (LORA,), LORA_ASKED, "peft", "gsm8k", STRONG),
    TrainingRow(
        "joint-gsm8k",
        "training",
        "LoRA and post-block, GSM8K; theirs LoRA alone",
        (LORA, STEERING),
        LORA_ASKED,
        "peft",
        "gsm8k",
        STRONG,
        same=False,
    ),
    TrainingRow(
        "post-block-dense",
        "dense",
        "Post-block, full rows",
        (STEERING,),
        POST_BLOCK_ASKED,
        "PyTorch hooks",
        "dense",
        ("padded",),
    ),
    TrainingRow("lora-dense", "dense", "LoRA, full rows", (LORA,), LORA_ASKED, "peft", "dense", ("padded",)),
    TrainingRow(
        "full-dense",
        "dense",
        "Full fine-tuning, full rows",
        (),
        FULL_ASKED,
        "transformers",
        "dense",
        ("padded",),
        train_base=True,
    ),
)


def chosen(names: Sequence[str]) -> list[Row]:
    """The rows of these names and groups, in the table's order; all without a name. Commas separate names too.

    Raises:
        ValueError: an unknown name.
    """
    wanted = {name for text in names for name in text.split(",") if name}
    known = [*dict.fromkeys(row.group for row in ROWS), *(row.name for row in ROWS)]
    for name in sorted(wanted.difference(known)):
        raise ValueError(f"--rows: no row {name!r}{did_you_mean(name, known)}; there are {', '.join(known)}")
    return [row for row in ROWS if not wanted or wanted & {row.name, row.group}]
