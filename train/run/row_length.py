"""The length of a run's rows, chosen by the lengths of its examples: little padding, and little attention."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from jaxsteer.batches import rows_of
from jaxsteer.flops import step_flops
from jaxsteer.io import LoadedModel
from jaxsteer.models.attention import causal_share
from train.config import TrainConfig
from train.display.console import say
from train.run.program import make_program, mesh_of
from train.run.training import read_tokens

MULTIPLE = 64
"""Tokens between the row lengths that are considered."""

SAMPLE = 20_000
"""Examples whose packing tells the padding, at most; they are drawn at random."""


def with_row_length(config: TrainConfig, model: LoadedModel) -> TrainConfig:
    """The run with its row length decided, if it leaves that to the data (0).

    No example is too long that the model's context can take. Longer rows have less padding and more attention; the
    length with the fewest floating-point operations for each token that is not padding is taken.

    Args:
        config: the run.
        model: its base model; the weights are not needed.

    Raises:
        ValueError: no data.
    """
    if config.sequence_length:
        return config
    store, _ = read_tokens(config, model, None)
    supervised = store.supervised() / store.lengths.sum(dtype=np.int64)
    lengths = np.random.default_rng(config.seed).permutation(np.minimum(store.lengths, model.config.max_length))
    least = -(-int(lengths.max()) // MULTIPLE) * MULTIPLE
    chosen, fill = best_row_length(config, model, lengths[:SAMPLE], supervised, least)
    say(f"Rows have {chosen:,} tokens: {100 * fill:.1f} % of them are not padding (--sequence-length {chosen})")
    return replace(config, sequence_length=chosen)


def best_row_length(
    config: TrainConfig, model: LoadedModel, lengths: np.ndarray, supervised: float, least: int
) -> tuple[int, float]:
    """The row length with the fewest floating-point operations for each token that is not padding.

    Args:
        config, model: the run, whatever its row length.
        lengths: tokens of each example, shuffled; none more than `least` or the model's context.
        supervised: share of the tokens that are targets.
        least: the shortest row; longer ones have `MULTIPLE` more each.

    Returns:
        The length, and the share of its tokens that are not padding.
    """
    best, chosen, fullest = float("inf"), 0, 0.0
    context = model.config.max_length
    for length in range(least, context + MULTIPLE, MULTIPLE):
        length = min(length, context)
        fill = _fill(lengths, length, config.pack)
        cost = _cost(config, model, length, fill, supervised)
        if cost < best:
            best, chosen, fullest = cost, length, fill
        if not config.pack or _cost(config, model, length, 1.0, supervised) > best:
            break  # even full rows of this length, or a longer one, cost more
    return chosen, fullest


def _fill(lengths: np.ndarray, length: int, pack: bool) -> float:
    """Share of the tokens that are not padding in rows of a length."""
    rows = int(rows_of(lengths.tolist(), length).max()) + 1 if pack else len(lengths)
    return float(lengths.sum(dtype=np.int64)) / (rows * length)


def _cost(config: TrainConfig, model: LoadedModel, length: int, fill: float, supervised: float) -> float:
    """Floating-point operations of a training step for each token that is not padding.

    Args:
        config, model: the run.
        length: tokens per row.
        fill: share of them that are not padding.
        supervised: share of those that are targets.
    """
    run = replace(config, sequence_length=length)
    program = make_program(run, model.config, model.base, steps=config.steps or 1, mesh=mesh_of(run))
    share = causal_share(length, program.attention[0])
    real = config.batch_size * length * fill
    flops = step_flops(program.model, config.batch_size, length, round(real * supervised), causal_share=share)
    return flops.executed / real
