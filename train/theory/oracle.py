"""What oracle steering gives back, and through which sites: the study `oracle_steering`."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

from jaxsteer.models.transformer import Network
from jaxsteer.theory.compare import Means, compare_networks, means, totals
from jaxsteer.theory.oracle import oracle_steering, replayed
from jaxsteer.theory.shares import SHARED_SITES, Stream, examples_of, share_intervals, site_shares
from jaxsteer.types import Array, Batch
from train.display.console import progress
from train.display.plots import plot_by_layer
from train.theory.subjects import counter, read_pair, recovered, write_result


@dataclass(frozen=True)
class OracleStudy:
    """How much of a fine-tuning oracle steering gives back: at every block, at one, at other sites; and the share of
    each block's shift that goes through each site. Figures: oracle_layers.png, shares_own.png, shares_whole.png.
    """

    tuned: str = "runs/theory/lora/steering.safetensors"
    """The fine-tuning: a steering file, or a folder of a fully fine-tuned model."""
    config: str = "configs/theory.py"
    """The config file that it was trained with: names the base and the task."""
    examples: int = 120
    """Test examples."""
    batch_size: int = 8
    """Rows of a batch."""
    sequence_length: int = 96
    """Tokens of a row."""
    every: int = 3
    """Layers between those at which a single block is replayed."""
    out: str = "runs/theory/oracle"
    """Folder of the figures and of oracle.json."""

    def run(self) -> None:
        """Measure, draw, print a table and write oracle.json.

        Raises:
            ValueError: there is no such fine-tuning.
        """
        pair = read_pair(self.tuned, self.config)
        batches = pair.batches("test", self.examples, rows=self.batch_size, length=self.sequence_length)
        count = pair.base.model.config.layers
        single = sorted({*range(0, count, self.every), count - 1})
        total = 4 * len(batches) + (3 + len(SHARED_SITES) + len(single)) * len(batches)
        data: dict[str, Any] = {"examples": self.examples, "layers": single}
        with progress(total, "Replaying") as bar:
            tick = counter(bar.update)
            both: tuple[Stream, ...] = ("own", "whole")
            shares = {stream: self._shares(pair.base, pair.tuned, batches, stream, tick) for stream in both}
            found = self._replays(pair.base, pair.tuned, batches, single, tick)
        data["shares"] = {
            stream: {
                site: {"share": s.tolist(), "low": lo.tolist(), "high": hi.tolist()}
                for site, s, lo, hi in zip(SHARED_SITES, *values, strict=True)
            }
            for stream, values in shares.items()
        }
        base, tuned = found["base"], found["fine-tuned"]
        data["replays"] = {name: {**m._asdict(), "recovered": recovered(m, base, tuned)} for name, m in found.items()}
        path = write_result(self.out, "oracle", data)
        self._draw(data, single, count)
        table = Table(title="Oracle steering", title_justify="left")
        for column in ("replayed", "KL, nats", "same answer token", "accuracy", "gain recovered"):
            table.add_column(column)
        for name, m in found.items():
            shown = (f"{m.kl:.4f}", f"{m.agreement:.3f}", f"{m.accuracy:.3f}", f"{recovered(m, base, tuned):.2f}")
            table.add_row(name, *shown)
        Console().print(table)
        print(f"figures and numbers: {path.parent}")

    def _shares(self, base: Network, tuned: Network, batches: list[Batch], stream: Stream, tick: Any) -> Any:
        parts = []
        run = jax.jit(partial(site_shares, stream=stream))
        for batch in batches:
            parts.append(examples_of(run(base, tuned, batch)))
            tick()
            tick()
        left, whole = (np.concatenate(each, axis=-1) for each in zip(*parts, strict=True))
        return share_intervals(left, whole)

    def _replays(
        self, base: Network, tuned: Network, batches: list[Batch], single: list[int], tick: Any
    ) -> dict[str, Means]:
        shift_of = jax.jit(oracle_steering, static_argnames="site")
        taps = jax.jit(lambda network, batch: network(batch, ("block",)).taps["block"])
        check = jax.jit(lambda tuned, network, batch: totals(compare_networks(tuned, network, batch), batch))
        sums: dict[str, Any] = {}

        def add(name: str, network: Network, batch: Batch) -> None:
            found = check(tuned, network, batch)
            sums[name] = found if name not in sums else jax.tree.map(jnp.add, sums[name], found)
            tick()

        for batch in batches:
            difference: Array = taps(tuned, batch) - taps(base, batch)
            add("base", replayed(base, jnp.zeros_like(difference)), batch)
            for site in SHARED_SITES:
                name = "every block" if site == "block" else f"{site}, every layer"
                add(name, replayed(base, shift_of(base, tuned, batch, site=site), site=site), batch)
            add("plain differences, every block", replayed(base, difference), batch)
            for layer in single:  # zeros elsewhere: one program for all
                alone = jnp.zeros_like(difference).at[layer].set(difference[layer])
                add(f"block {layer} alone", replayed(base, alone), batch)
            add("fine-tuned", replayed(tuned, jnp.zeros_like(difference)), batch)
        return {name: means(value) for name, value in sums.items()}

    def _draw(self, data: dict[str, Any], single: list[int], count: int) -> None:
        folder = Path(self.out)
        titles = {"own": "of what a block's own weights change", "whole": "of the whole shift of a block's output"}
        for stream, title in titles.items():
            sites = data["shares"][stream]
            plot_by_layer(
                folder / f"shares_{stream}.png",
                {site: sites[site]["share"] for site in SHARED_SITES},
                bands={site: (sites[site]["low"], sites[site]["high"]) for site in SHARED_SITES},
                ylabel="share explained",
                title=f"Share {title} that goes through each site",
            )
        values = np.full((2, count), np.nan)
        for layer in single:
            found = data["replays"][f"block {layer} alone"]
            values[:, layer] = found["kl"], found["recovered"]
        plot_by_layer(
            folder / "oracle_layers.png",
            {"KL to the fine-tuned model, nats": values[0].tolist(), "share of the accuracy gain": values[1].tolist()},
            ylabel="",
            title="The oracle's shift at one block alone",
        )
