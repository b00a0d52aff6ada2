"""How much of the shift of a block's output goes through each site.

At block ℓ both models read the same stream h, and fine-tuning shifts the output by Δ = block′(h) − block(h). What site
s explains of it is what the base block does when only s is set to its fine-tuned value:

    share = 1 − Σ‖block′(h) − block(h; s)‖² / Σ‖Δ‖²

On the fine-tuned stream, Δ is what the block's own weights change. On the stream of each model, Δ also has what earlier
blocks changed, which only a shift of the block's output can make up for.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import jax.numpy as jnp
import numpy as np

from jaxsteer.models.transformer import Network
from jaxsteer.objectives.tokens import by_segment
from jaxsteer.theory.oracle import block_inputs, blocks_on, check_comparable, check_site, replayed
from jaxsteer.types import Array, Batch

Stream = Literal["own", "whole"]
"""own: both blocks read the fine-tuned stream; whole: each block reads the stream of its own model."""
SHARED_SITES = ("attn", "mlp.in", "mlp", "block")
"""Sites that shares are measured at by default."""


class Shares(NamedTuple):
    """Sums of squares over each example's tokens, by the example's number in its row (0 = padding).

    left   what a site leaves of the shift, [sites, L, B, T + 1]
    whole  the shift, [L, B, T + 1]
    """

    left: Array
    whole: Array


def site_shares(
    network: Network,
    tuned: Network,
    batch: Batch,
    sites: Sequence[str] = SHARED_SITES,
    stream: Stream = "own",
) -> Shares:
    """What each site alone explains of the shift of each block's output.

    Args:
        network: the base model.
        tuned: the fine-tuned model.
        batch: [B, T], packed or padded.
        sites: static.
        stream: what the blocks read; static.

    Raises:
        ValueError: models of different shapes, an unknown site or stream.
    """
    check_comparable(network, tuned)
    for site in sites:
        check_site(site)
    if stream not in ("own", "whole"):
        raise ValueError(f"stream must be own or whole, got {stream!r}")
    tuned_inputs = block_inputs(tuned, batch)
    inputs = tuned_inputs if stream == "own" else block_inputs(network, batch)
    capture = tuple(dict.fromkeys((*sites, "block")))
    wanted, plain = blocks_on(tuned, batch, tuned_inputs, capture), blocks_on(network, batch, inputs, capture)
    squares = lambda values: by_segment(jnp.sum(values.astype(jnp.float32) ** 2, axis=-1), batch)

    def left(site: str) -> Array:
        alone = replayed(network, wanted[site] - plain[site], site=site)
        return squares(wanted["block"] - blocks_on(alone, batch, inputs, ("block",))["block"])

    return Shares(jnp.stack([left(site) for site in sites]), squares(wanted["block"] - plain["block"]))


def examples_of(shares: Shares) -> tuple[np.ndarray, np.ndarray]:
    """(left [sites, L, n], whole [L, n]) of a batch's n examples, without padding; concatenate them over batches."""
    left, whole = (np.asarray(values)[..., 1:] for values in shares)
    left, whole = left.reshape(*left.shape[:2], -1), whole.reshape(whole.shape[0], -1)
    real = np.any(whole > 0, axis=0)
    return left[..., real], whole[..., real]


def share_intervals(
    left: np.ndarray, whole: np.ndarray, *, level: float = 0.95, draws: int = 1000, seed: int = 0
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Shares with bootstrap intervals over the examples.

    Args:
        left: from `examples_of`, [sites, L, n].
        whole: from `examples_of`, [L, n].
        level: of the interval, e.g. 0.95.
        draws: number of bootstrap samples.
        seed: random seed of the bootstrap.

    Returns:
        (share, low, high), each [sites, L].

    Raises:
        ValueError: no examples.
    """
    n = whole.shape[-1]
    if not n:
        raise ValueError("no examples to compute shares from")
    counts = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=draws)  # [draws, n]
    ratio = lambda weights: 1 - (left @ weights) / np.maximum((whole @ weights)[None], np.finfo(np.float32).tiny)
    drawn = ratio(counts.T.astype(np.float64))
    low, high = np.quantile(drawn, [(1 - level) / 2, (1 + level) / 2], axis=-1)
    return ratio(np.ones((n, 1)))[..., 0], low, high
