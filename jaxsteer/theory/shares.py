"""How much of what fine-tuning does to a block's output comes through each site.

At block ℓ both models read the same stream h. The shift is Δ = block′(h) − block(h); site s explains of it what the
base block does when only s is set to its fine-tuned value:

    share = 1 − Σ‖block′(h) − block(h; s)‖² / Σ‖Δ‖²

On the fine-tuned stream that is the block's own part, what its own weights changed. On the streams that each model
really has, Δ also holds what came from below, which only the block's output can make up for.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import jax.numpy as jnp
import numpy as np

from jaxsteer.models.transformer import Network
from jaxsteer.theory.compare import by_example
from jaxsteer.theory.oracle import block_inputs, blocks_on, check_comparable, check_site, replayed
from jaxsteer.types import Array, Batch

Stream = Literal["own", "whole"]
"""own: both blocks read the fine-tuned stream; whole: each reads the stream of its own model."""
SHARED_SITES = ("attn", "mlp.in", "mlp", "block")


class Shares(NamedTuple):
    """Sums of squares over each example's tokens, [sites, L, B, T + 1] and [L, B, T + 1], by the example's number in
    its row (0 = padding): what a site leaves of the shift, and the shift.
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
    """What each site, alone, explains of the shift of each block's output.

    Args:
        network, tuned: the base and the fine-tuned model. sites, stream: static.

    Raises:
        ValueError: models of different shapes, an unknown site or stream.
    """
    check_comparable(network, tuned)
    for site in sites:
        check_site(site)
    if stream not in ("own", "whole"):
        raise ValueError(f"which stream? own or whole, got {stream!r}")
    theirs = block_inputs(tuned, batch)
    mine = theirs if stream == "own" else block_inputs(network, batch)
    capture = tuple(dict.fromkeys((*sites, "block")))
    told, plain = blocks_on(tuned, batch, theirs, capture), blocks_on(network, batch, mine, capture)
    squares = lambda values: by_example(jnp.sum(values.astype(jnp.float32) ** 2, axis=-1), batch)

    def left(site: str) -> Array:
        alone = replayed(network, told[site] - plain[site], site=site)
        return squares(told["block"] - blocks_on(alone, batch, mine, ("block",))["block"])

    return Shares(jnp.stack([left(site) for site in sites]), squares(told["block"] - plain["block"]))


def examples_of(shares: Shares) -> tuple[np.ndarray, np.ndarray]:
    """(left [sites, L, n], whole [L, n]) of the n examples, without padding; concatenate those of several batches."""
    left, whole = (np.asarray(values)[..., 1:] for values in shares)
    left, whole = left.reshape(*left.shape[:2], -1), whole.reshape(whole.shape[0], -1)
    there = np.any(whole > 0, axis=0)
    return left[..., there], whole[..., there]


def share_intervals(
    left: np.ndarray, whole: np.ndarray, *, level: float = 0.95, draws: int = 1000, seed: int = 0
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Shares with intervals by bootstrap over the examples: (share, low, high), each [sites, L].

    Args:
        left, whole: of `examples_of`, [sites, L, n] and [L, n].
        level: of the interval. draws: of the bootstrap. seed: of the draws.
    """
    n = whole.shape[-1]
    if not n:
        raise ValueError("no examples to take shares of")
    counts = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=draws)  # [draws, n]
    ratio = lambda weights: 1 - (left @ weights) / np.maximum((whole @ weights)[None], np.finfo(np.float32).tiny)
    drawn = ratio(counts.T.astype(np.float64))
    low, high = np.quantile(drawn, [(1 - level) / 2, (1 + level) / 2], axis=-1)
    return ratio(np.ones((n, 1)))[..., 0], low, high
