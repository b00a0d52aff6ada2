"""The table of what is measured."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Protocol

from jaxsteer.plans import did_you_mean
from train.bench.against.arena import Arena
from train.bench.against.contest import Better, Contest
from train.bench.against.decoding import DecodingRow, EvaluationRow
from train.bench.against.fresh import MemoryRow, StartRow
from train.bench.against.training import TrainingRow

STEERING, LORA = "nonlinear(rank=8) @ block", "lora(rank=8, alpha=8) @ projections"


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
        """Unit of the figure."""
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


POST_BLOCK = TrainingRow(
    "post-block-gsm8k",
    "training",
    "Post-block, GSM8K",
    plan=(STEERING,),
    asked={"method": "post-block", "rank": 8, "alpha": 1.0},
    opponent="PyTorch hooks",
    data="gsm8k",
    collates=("padded",),
)
LORA_ROW = TrainingRow(
    "lora-gsm8k",
    "training",
    "LoRA, GSM8K",
    plan=(LORA,),
    asked={"method": "lora", "rank": 8, "alpha": 8.0},
    opponent="peft",
    data="gsm8k",
    collates=("packed", "flattened", "grouped"),
)
FULL = TrainingRow(
    "full-dense",
    "dense",
    "Full fine-tuning, full rows",
    plan=(),
    asked={"method": "full", "rank": 0, "alpha": 0.0},
    opponent="transformers",
    data="dense",
    collates=("padded",),
    train_base=True,
)

ROWS: tuple[Row, ...] = (
    POST_BLOCK,
    replace(POST_BLOCK, name="post-block-boolq", title="Post-block, BoolQ questions", data="boolq"),
    LORA_ROW,
    replace(LORA_ROW, name="joint-gsm8k", title="LoRA + post-block, GSM8K", plan=(LORA, STEERING), same=False),
    replace(POST_BLOCK, name="post-block-dense", group="dense", title="Post-block, full rows", data="dense"),
    replace(LORA_ROW, name="lora-dense", group="dense", title="LoRA, full rows", data="dense", collates=("padded",)),
    FULL,
    DecodingRow("decoding-1", "decoding", "Greedy decoding, batch 1", STEERING, batch_size=1, batches=4),
    DecodingRow("decoding-8", "decoding", "Greedy decoding, batch 8", STEERING, batch_size=8, batches=2),
    DecodingRow("decoding-32", "decoding", "Greedy decoding, batch 32", STEERING, batch_size=32, batches=1),
    EvaluationRow("evaluation", "evaluation", "Answering a set", STEERING, rows=96, tried=(8, 16, 32, 64)),
    EvaluationRow("evaluation-alone", "evaluation", "Answering a set", STEERING, rows=96, tried=()),
    MemoryRow("memory-post-block", "Memory, post-block, GSM8K", POST_BLOCK, "padded"),
    MemoryRow("memory-lora", "Memory, LoRA, GSM8K", LORA_ROW, "packed"),
    StartRow("start-cold", "Start to first step, the first time", POST_BLOCK, warm=False),
    StartRow("start-warm", "Start to first step, again", POST_BLOCK, warm=True),
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
