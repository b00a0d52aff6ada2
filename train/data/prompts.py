"""Batches of prompts to generate from."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple

import numpy as np

from jaxsteer.rows import bucket_length, stack_rows
from jaxsteer.types import Batch
from train.data.examples import TokenizedExample


class PromptBatch(NamedTuple):
    """Prompts of similar length, one a row.

    batch    numpy Batch [n, T]; rows without a prompt are all zeros (segment 0)
    indices  int32 [n], each row's index in the prompts given; -1 for a row without a prompt
    """

    batch: Batch
    indices: np.ndarray


def prompt_batches(
    prompts: Sequence[TokenizedExample],
    rows: int,
    *,
    side: Literal["left", "right"] = "left",
    lengths: Sequence[int] | None = None,
) -> Iterator[PromptBatch]:
    """Batches of all prompts, the longest first, so that too little memory shows at once.

    Args:
        prompts: From `encode_prompts`.
        rows: Prompts in a batch (n); the last is filled up with empty rows.
        side: Where the padding goes. Left: all prompts end in the last column.
        lengths: Allowed lengths T, so that a program is compiled for a few shapes only; None = those of
            `bucket_length`.

    Yields:
        Batches of the smallest allowed length that holds their longest prompt.

    Raises:
        ValueError: where a prompt is longer than every allowed length; for bad settings.
    """
    if rows < 1:
        raise ValueError(f"prompt batches: got {rows} rows, need at least 1")
    if side not in ("left", "right"):
        raise ValueError(f"prompt batches: got side {side!r}, allowed are 'left' and 'right'")
    # Stable, so that prompts of one length keep their order.
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    for start in range(0, len(order), rows):
        chosen = order[start : start + rows]
        longest = prompts[chosen[0]]
        if lengths is None:
            length = bucket_length(len(longest))
        else:
            length = min((n for n in lengths if n >= len(longest)), default=0)
            if not length:
                raise ValueError(
                    f"{longest.source}: a prompt of {len(longest)} tokens, but the allowed lengths are "
                    f"{sorted(lengths)}; add a longer one"
                )
        empty = rows - len(chosen)
        batch = stack_rows([[prompts[i]] for i in chosen] + [[] for _ in range(empty)], length, left=side == "left")
        yield PromptBatch(batch, np.array(chosen + [-1] * empty, np.int32))
