"""What oracle steering recovers, and through which sites: the study `oracle`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from jaxsteer.models.transformer import Network
from jaxsteer.ranges import Count
from jaxsteer.theory import Means, Totals, compare_networks, means, oracle_steering, replayed, totals
from jaxsteer.theory.shares import SHARED_SITES, Stream, examples_of, share_intervals, site_shares
from jaxsteer.types import Array, Batch
from train.display.plots import plot_by_layer
from train.theory.study import Data, PairStudy, Row, Ticker, ticking
from train.theory.subjects import comparison_rows, count_examples, with_recovered

STREAMS: dict[Stream, str] = {
    "own": "of what a block's own weights change",
    "whole": "of the whole shift of a block's output",
}
"""The streams that shares are measured on, and what the shares are of."""


@dataclass(frozen=True, kw_only=True)
class OracleStudy(PairStudy):
    """How much of a fine-tuning oracle steering recovers, at every block, at one block, at other sites; and the share
    of each block's shift that goes through each site. Figures: oracle_layers.png, shares_own.png, shares_whole.png.
    """

    name = "oracle"
    title = "Oracle steering"

    every: Count = 3
    """Replay single blocks at every N-th layer, and at the last."""
    out: str = "runs/theory/oracle"
    """Output folder for the figures and oracle.json."""

    def measure(self) -> Data:
        """Shares of the sites, and KL, agreement and accuracy of each replay."""
        base, tuned = self.read()
        batches = self.test_batches(base)
        last = base.loaded.config.layers - 1
        layers = sorted({*range(0, last, self.every), last})
        replays = 3 + len(SHARED_SITES) + len(layers)
        with ticking((len(STREAMS) + replays) * len(batches), "Replaying") as tick:
            shares = {stream: _shares(base.network, tuned, batches, stream, tick) for stream in STREAMS}
            results = _replays(base.network, tuned, batches, layers, tick)
        return {
            "examples": count_examples(batches),
            "layers": layers,
            "shares": shares,
            "replays": with_recovered(results),
        }

    def draw(self, data: Data, folder: Path) -> None:
        """Shares by layer, and what the oracle's shift at one block alone does."""
        for stream, whose in STREAMS.items():
            sites = data["shares"][stream]
            plot_by_layer(
                folder / f"shares_{stream}.png",
                {site: values["share"] for site, values in sites.items()},
                bands={site: (values["low"], values["high"]) for site, values in sites.items()},
                ylabel="share explained",
                title=f"Share {whose} that goes through each site",
            )
        kl, recovered = np.full((2, data["layers"][-1] + 1), np.nan)
        for layer in data["layers"]:
            result = data["replays"][_alone(layer)]
            kl[layer], recovered[layer] = result["kl"], result["recovered"]
        plot_by_layer(
            folder / "oracle_layers.png",
            {"KL to the fine-tuned model, nats": kl.tolist(), "share of the accuracy gain": recovered.tolist()},
            ylabel="",
            title="The oracle's shift at one block alone",
        )

    def rows(self, data: Data) -> Sequence[Row]:
        """A row per replay."""
        return comparison_rows(data["replays"], "replayed")


def _alone(layer: int) -> str:
    return f"block {layer} alone"


def _shares(
    base: Network, tuned: Network, batches: Sequence[Batch], stream: Stream, tick: Ticker
) -> dict[str, dict[str, list[float]]]:
    """{site: {"share" | "low" | "high": [L]}}, with bootstrap intervals over the examples."""
    shares_of = jax.jit(partial(site_shares, stream=stream))
    parts = []
    for batch in batches:
        parts.append(examples_of(shares_of(base, tuned, batch)))
        tick()
    left, whole = (np.concatenate(part, axis=-1) for part in zip(*parts, strict=True))
    return {
        site: {"share": share.tolist(), "low": low.tolist(), "high": high.tolist()}
        for site, share, low, high in zip(SHARED_SITES, *share_intervals(left, whole), strict=True)
    }


def _replays(
    base: Network, tuned: Network, batches: Sequence[Batch], layers: Sequence[int], tick: Ticker
) -> dict[str, Means]:
    """How each replay of the tuned model's shifts compares with that model."""
    shifts_at = jax.jit(oracle_steering, static_argnames="site")
    stream_of = jax.jit(lambda network, batch: network(batch, ("block",)).taps["block"])
    compare = jax.jit(lambda tuned, network, batch: totals(compare_networks(tuned, network, batch), batch))
    sums: dict[str, Totals] = {}

    def add(name: str, network: Network, batch: Batch) -> None:
        result = compare(tuned, network, batch)
        sums[name] = jax.tree.map(jnp.add, sums[name], result) if name in sums else result
        tick()

    for batch in batches:
        difference: Array = stream_of(tuned, batch) - stream_of(base, batch)
        add("base", replayed(base, jnp.zeros_like(difference)), batch)
        for site in SHARED_SITES:
            name = "every block" if site == "block" else f"{site}, every layer"
            add(name, replayed(base, shifts_at(base, tuned, batch, site=site), site=site), batch)
        add("plain differences, every block", replayed(base, difference), batch)
        for layer in layers:  # zeros elsewhere: one compiled program for all layers
            add(_alone(layer), replayed(base, jnp.zeros_like(difference).at[layer].set(difference[layer])), batch)
        add("fine-tuned", replayed(tuned, jnp.zeros_like(difference)), batch)
    return {name: means(value) for name, value in sums.items()}
