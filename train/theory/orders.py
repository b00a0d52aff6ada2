"""How far a Taylor expansion in the update carries: the study `orders`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from jaxsteer.params import Params
from jaxsteer.ranges import Count, Inside, Natural
from jaxsteer.theory import Remainders, explained, first_order, higher_order, only_layer, reach, remainders
from jaxsteer.theory.shifts import check_sites, log_slope
from jaxsteer.types import Array, Batch
from train.display.plots import Panel, plot_lines
from train.theory.study import Data, Row, Study, Ticker, ticking
from train.theory.subjects import Update, cast, count_tokens, read_base, read_update

WINDOW = (-11, -8)
"""Powers of 2 between which slopes are taken."""

TOGETHER = 5
"""Number of scales measured in one call."""

LOCAL = -4
"""Smallest scale of one layer's update, as a power of 2: first order carries further there."""

KINDS = {"whole": "the whole update", "local": "each layer's own"}
"""What is expanded: keys of a fine-tuning's results, and their titles."""


@dataclass(frozen=True, kw_only=True)
class OrdersStudy(Study):
    """How much of a fine-tuning's activation shift its expansion to order 1, 2, 3 explains, at scales of the update.

    The update is scaled from far below to beyond what training made it (scale 1): all of it, so that layers act on
    each other, and that of each layer alone, measured at that layer. Figures: remainders_NAME.png, what each order
    leaves against the scale, with slopes 2, 3, 4 where the expansion holds; share.png, the share that first order
    explains against the scale; reach.png, the scale up to which it explains 90 %, by layer and site.
    """

    name = "orders"
    title = "Medians over layers"

    tuned: tuple[str, ...] = ("runs/theory/lora/steering.safetensors", "runs/theory/full/model")
    """Fine-tunings: steering files (*.safetensors), or folders of fully fine-tuned models."""
    sites: tuple[str, ...] = ("attn", "mlp.in", "mlp", "block")
    """Sites at which shifts are measured."""
    order: Count = 3
    """Highest order of the expansion; costs 2 ** order forward passes."""
    smallest: int = -12
    """Smallest scale of the update, as a power of 2."""
    largest: int = 2
    """Largest scale of the update, as a power of 2."""
    level: Inside = 0.9
    """Share explained, 1 - |shift - first order|² / |shift|², up to which an order is said to reach."""
    local_every: Natural = 3
    """Also measure each layer's own update, at every N-th layer, in float32; 0 = do not."""
    batch_size: Count = 2
    """Rows per batch."""
    sequence_length: Count = 96
    """Tokens per row; several examples share one."""
    batches: Count = 1
    """Number of batches to measure on; energies are summed over them."""
    dtype: Literal["float32", "float64"] = "float64"
    """Precision of the whole update's expansion. In float32, rounding hides the remainders of higher orders."""
    out: str = "runs/theory/orders"
    """Output folder for the figures and orders.json."""

    @property
    def scales(self) -> np.ndarray:
        """Factors on the whole update."""
        return 2.0 ** np.arange(self.smallest, self.largest + 1)

    @property
    def local_scales(self) -> np.ndarray:
        """Factors on the update of one layer."""
        return self.scales[self.scales >= 2.0**LOCAL]

    def measure(self) -> Data:
        """Expand each fine-tuning: {its name: {"whole" | "local": shares, reach and slopes}}, beside the settings."""
        self._check()
        base = read_base(self.config, self.tuned, splits=("test",))
        rows = {"batch_size": self.batch_size, "sequence_length": self.sequence_length}
        batches = base.training_batches("test", self.batches, **rows)
        updates = [read_update(path, base) for path in self.tuned]
        layers = range(base.loaded.config.layers)
        some = layers[:: self.local_every] if self.local_every > 0 else range(0)
        whole_passes = 2**self.order + len(self.scales) + -(-len(self.scales) // TOGETHER)
        local_passes = sum(_changes_weights(update) for update in updates) * self._local_passes * len(some)
        data: Data = {"model": base.config.model, "level": self.level, "tokens": count_tokens(batches)}
        with ticking(self.batches * (len(updates) * whole_passes + local_passes), "Forward passes") as tick:
            for update in updates:
                with jax.enable_x64(True) if self.dtype == "float64" else nullcontext():
                    whole = _sum([self._expand(update, batch, tick) for batch in batches])
                    results = {"whole": self._summary(whole, layers) | {"size": _sizes(whole)}}
                if some and _changes_weights(update):
                    local = _sum([self._expand_layers(update, batch, some, tick) for batch in batches])
                    results["local"] = self._summary(local, some)
                data[update.name] = results
        return data

    def draw(self, data: Data, folder: Path) -> None:
        """What each order leaves, the share that first order explains, and how far it reaches."""
        shares, reaches = [], []
        for name, kind, results in _results(data):
            scales, title = results["scales"], f"{name}, {KINDS[kind]}"
            medians = {
                site: (scales, np.clip(np.median(np.asarray(share, float), axis=1), 0, 1))
                for site, share in results["share"]["1"].items()
            }
            shares.append(Panel(medians, "scale of the update", "share explained", title, "x", self.level))
            lines = {site: (results["layers"], values) for site, values in _reached(results).items()}
            reaches.append(Panel(lines, "layer", "scale reached", title, "y", 1.0))
            if kind == "whole":
                title = f"What each order leaves: {name} ({data['model']}); dotted: powers 2, 3, ..."
                plot_lines(folder / f"remainders_{name}.png", _remainder_panels(results), title=title)
        title = f"Share explained by first order, layers' median ({data['model']})"
        plot_lines(folder / "share.png", shares, title=title)
        title = f"Scale up to which first order explains {100 * self.level:.0f} % ({data['model']})"
        plot_lines(folder / "reach.png", reaches, title=title)

    def rows(self, data: Data) -> Sequence[Row]:
        """For each fine-tuning the share at scale 1, the scale reached, and the slopes of the remainders, by site."""
        rows = []
        for name, kind, results in _results(data):
            one = results["scales"].index(1.0)
            by_site = {
                "share at scale 1": {site: share[one] for site, share in results["share"]["1"].items()},
                f"{100 * self.level:.0f} % up to scale": _reached(results),
            }
            if kind == "whole":
                by_site |= {f"slope of order {order}": slopes for order, slopes in results["slope"].items() if slopes}
            for quantity, values in by_site.items():
                medians = {site: f"{np.median(value):.3g}" for site, value in values.items()}
                rows.append({"update": f"{name}, {KINDS[kind]}", "": quantity, **medians})
        return rows

    def _check(self) -> None:
        check_sites(self.sites)
        if not self.smallest < 0 < self.largest:
            raise ValueError(
                f"--smallest must be below 0 and --largest above; got scales 2**{self.smallest} to 2**{self.largest}"
            )

    @property
    def _local_passes(self) -> int:
        """Forward passes that one layer's own update takes."""
        return 3 + len(self.local_scales)

    def _expand(self, update: Update, batch: Batch, tick: Ticker) -> Remainders:
        """Expand in the whole update, to all orders and at all scales."""
        at, delta = cast((update.at, update.delta), self.dtype)
        expand = jax.jit(partial(higher_order, update.model, sites=self.sites, order=self.order))
        measure = jax.jit(partial(remainders, update.model))
        terms = jax.block_until_ready(expand(at, delta, batch))
        tick(count=2**self.order)
        parts = []
        for scales in np.array_split(self.scales, -(-len(self.scales) // TOGETHER)):
            parts.append(jax.device_get(measure(at, delta, batch, terms, scales)))
            tick(count=1 + len(scales))
        join = lambda axis: lambda *arrays: np.concatenate(arrays, axis=axis)
        shift = jax.tree.map(join(0), *[part.shift for part in parts])
        return Remainders(jnp.asarray(self.scales), shift, jax.tree.map(join(1), *[part.remainder for part in parts]))

    def _expand_layers(self, update: Update, batch: Batch, layers: Sequence[int], tick: Ticker) -> Remainders:
        """Expand in each layer's own update, at that layer, to first order."""

        @jax.jit
        def measure(at: Params, delta: Params, layer: Array) -> Remainders:
            own = only_layer(delta, layer)
            terms = (first_order(update.model, at, own, batch, self.sites),)
            found = remainders(update.model, at, own, batch, terms, self.local_scales.astype(np.float32))
            here = lambda energies: energies[..., layer]
            return Remainders(found.scales, jax.tree.map(here, found.shift), jax.tree.map(here, found.remainder))

        parts = []
        for layer in layers:
            parts.append(jax.device_get(measure(update.at, update.delta, jnp.asarray(layer))))
            tick(count=self._local_passes)
        stack = lambda *arrays: np.stack(arrays, axis=-1)
        shift = jax.tree.map(stack, *[part.shift for part in parts])
        return Remainders(parts[0].scales, shift, jax.tree.map(stack, *[part.remainder for part in parts]))

    def _summary(self, found: Remainders, layers: Sequence[int]) -> dict[str, Any]:
        """Shares [S][L], the scale that each order reaches [L] (None = beyond all), slopes [L]; by order and site."""
        orders = range(1, next(iter(found.remainder.values())).shape[0] + 1)
        shares = {str(order): explained(found, order) for order in orders}
        scale_reached = lambda share: [
            float(scale) if np.isfinite(scale) else None for scale in reach(found.scales, share, self.level)
        ]
        by_site = lambda f, values: {site: f(value) for site, value in values.items()}
        to_list = lambda share: np.asarray(share).tolist()
        return {
            "layers": list(layers),
            "scales": np.asarray(found.scales).tolist(),
            "share": {order: by_site(to_list, share) for order, share in shares.items()},
            "reach": {order: by_site(scale_reached, share) for order, share in shares.items()},
            "slope": {str(order): _slopes(found, order) for order in orders},
        }


def _changes_weights(update: Update) -> bool:
    return bool(jax.tree.leaves(update.delta.base))


def _sum(parts: Sequence[Remainders]) -> Remainders:
    """The energies of several batches together."""
    add = lambda *energies: sum(energies)
    shift = jax.tree.map(add, *[part.shift for part in parts])
    return Remainders(parts[0].scales, shift, jax.tree.map(add, *[part.remainder for part in parts]))


def _slopes(found: Remainders, order: int) -> dict[str, list[float]]:
    """{site: the slope of each layer's remainder over the window, [L]}; empty with fewer than two scales in it."""
    powers = np.log2(np.asarray(found.scales))
    window = (powers >= WINDOW[0]) & (powers <= WINDOW[1])
    if window.sum() < 2:
        return {}
    slope = lambda left: log_slope(np.asarray(found.scales)[window], np.sqrt(left[order - 1][window]))
    return {site: np.asarray(slope(left)).tolist() for site, left in found.remainder.items()}


def _sizes(found: Remainders) -> dict[str, dict[str, list[float]]]:
    """{"shift" or an order: {site: [S]}}: norms over all layers of the shift and of what the order leaves of it,
    relative to the shift at scale 1.
    """
    one = int(np.argmin(np.abs(np.asarray(found.scales) - 1)))
    norm = lambda energies: np.sqrt(np.sum(energies, axis=-1))
    whole = {site: norm(energies)[one] for site, energies in found.shift.items()}
    relative = lambda energies: {site: (norm(energies[site]) / whole[site]).tolist() for site in whole}
    orders = range(next(iter(found.remainder.values())).shape[0])
    left = {str(n + 1): relative({site: left[n] for site, left in found.remainder.items()}) for n in orders}
    return {"shift": relative(found.shift), **left}


def _results(data: Data) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """(name, "whole" | "local", summary) of each fine-tuning."""
    for name, results in data.items():
        if isinstance(results, Mapping):
            yield from ((name, kind, results[kind]) for kind in KINDS if kind in results)


def _reached(results: dict[str, Any]) -> dict[str, list[float]]:
    """{site: the scale that first order reaches in each layer}; the largest scale, where it is beyond."""
    largest = results["scales"][-1]
    first = results["reach"]["1"]
    return {site: [largest if scale is None else scale for scale in scales] for site, scales in first.items()}


def _remainder_panels(results: dict[str, Any]) -> list[Panel]:
    """For each site what each order leaves against the scale, and guides of slope order + 1."""
    scales = np.asarray(results["scales"])
    middle = int(np.argmin(np.abs(np.log2(scales) - sum(WINDOW) / 2)))
    near = slice(max(0, middle - 3), middle + 6)
    panels = []
    for site, shift in results["size"]["shift"].items():
        series = {"shift": (scales, np.asarray(shift))}
        for order in map(int, results["share"]):
            left = np.asarray(results["size"][str(order)][site])
            series[f"left by order {order}"] = (scales, left)
            guide = left[middle] * (scales[near] / scales[middle]) ** (order + 1)
            series[f"_{order}"] = (scales[near], guide)
        panels.append(Panel(series, "scale of the update", "size (shift at 1 = 1)", site, "xy"))
    return panels
