"""The stage peft: LoRA steps of an 8B model here and by peft, in turn, on the same device and at the same shapes."""

from __future__ import annotations

import statistics
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

from jaxsteer.models.families import FAMILIES, config_to_hf
from train.bench.accelerator.records import Context, Figures, OutOfMemory, Record, Row, Stage
from train.bench.accelerator.settings import LORA, AcceleratorBench
from train.bench.accelerator.training import Trial, row_of, rows_of
from train.peers import ask_peer

GOAL = 1.3
"""Tokens/s of jaxsteer over those of peft that should be reached."""

OURS = "jaxsteer"

RANK = 8
"""Rank that both sides train, as in `settings.LORA`."""

TIMEOUT = 600.0
"""Seconds after which peft is stopped where there is no time limit."""


class Theirs(NamedTuple):
    """A way to train with peft: its name in the table, and settings of the peer's request."""

    name: str
    checkpointing: bool


PEERS = (Theirs("peft", False), Theirs("peft, checkpointing", True))


def _ask(peer: Theirs, size: int, context: Context) -> Figures:
    """What peft's program measures.

    Raises:
        OutOfMemory: it ran out of memory.
        ValueError: see `ask_peer`.
    """
    config, left = context.config, context.seconds_left
    request = {
        "config": config_to_hf(FAMILIES["llama"], config.shapes.model),
        "dtype": config.shapes.dtype,
        "rows": size,
        "length": config.shapes.length,
        "rank": RANK,
        "steps": config.steps,
        "checkpointing": peer.checkpointing,
    }
    python = Path(config.peer_python or sys.executable)
    said = ask_peer("accelerator", request, python, timeout=TIMEOUT if left is None else left)
    if full := said.get("out_of_memory"):
        raise OutOfMemory(full)
    seconds = statistics.median(said["seconds"])
    return {
        "tokens/s": size * config.shapes.length / seconds,
        "seconds per step": seconds,
        "loss": said["loss"],
        "peak memory, GB": said["peak_bytes"] / 1e9,
        "trainable": said["trainable"],
        **said["versions"],
    }


def rows(config: AcceleratorBench, records: Sequence[Record]) -> list[Row]:
    """Each side in turn, as often as asked; each row is one process."""
    found = []
    for size in config.shapes.batches[:2]:
        for pair in range(1, config.pairs + 1):
            ours = row_of(f"{OURS}, {rows_of(size)}, {pair}", Trial(LORA, size), config)
            found.append(ours)
            for peer in PEERS:
                settings = {**ours.settings, "peer": peer.name, "python": config.peer_python}
                name = f"{peer.name}, {rows_of(size)}, {pair}"
                measure = partial(_ask, peer, size)
                found.append(Row(name, measure, settings, 60.0, family=peer.name, size=size, here=True))
    return found


def summary(records: Sequence[Record]) -> list[str]:
    """The ratio of speeds in every pair: jaxsteer against the faster of peft's settings."""
    speed: dict[tuple[str, str], dict[str, float]] = {}
    for record in records:
        side, size, pair = record.row.rsplit(", ", 2)
        if record.outcome == "measured":
            speed.setdefault((size, pair), {})[side] = record.figures["tokens/s"]
    ratios: dict[str, list[float]] = {}
    for (size, _), by_side in speed.items():
        theirs = [value for side, value in by_side.items() if side != OURS]
        if OURS in by_side and theirs:
            ratios.setdefault(size, []).append(by_side[OURS] / max(theirs))
    return [
        f"{size}: {statistics.median(each):.2f} times peft's tokens/s (pairs: {', '.join(f'{r:.2f}' for r in each)}); "
        f"the goal is {GOAL:g}."
        for size, each in ratios.items()
    ]


STAGE = Stage("peft", "LoRA against peft at the same shapes, with and without gradient checkpointing", rows, summary)
