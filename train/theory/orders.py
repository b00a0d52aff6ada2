"""How far a Taylor expansion in the update carries: the study `orders`."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from jaxsteer.theory import Remainders, explained, higher_order, reach, remainders
from jaxsteer.theory.shifts import check_sites, log_slope
from train.base_models import load
from train.config import TrainConfig, load_config_file
from train.metrics import progress
from train.plots import Panel, plot_by_layer, plot_lines
from train.report import print_facts
from train.run_folder import write_json
from train.theory.subjects import Subject, cast, held_out, read_subject


@dataclass(frozen=True)
class Orders:
    """How much of a fine-tuning's activation shift its expansion to order 1, 2, 3 explains, at scales of the update.

    The update is scaled from far below to beyond what training made it (scale 1). Two figures for each fine-tuning:
    remainders.png, the size of what each order leaves against the scale, whose slopes are 2, 3, 4 where the expansion
    holds; reach.png, the scale at which first order stops explaining the asked share, by layer and site. share.png has
    the share against the scale for all of them.
    """

    tuned: tuple[str, ...] = ("runs/theory/lora/steering.safetensors", "runs/theory/full/model")
    """Fine-tunings: steering files (*.safetensors), or folders of fully fine-tuned models."""
    config: str = "configs/theory.py"
    """A config file: its model is the base, its task's test examples are what shifts are measured on."""
    sites: tuple[str, ...] = ("attn", "mlp.in", "mlp", "block")
    """Where shifts are measured."""
    order: int = 3
    """The highest order; it costs 2 ** order forward passes."""
    smallest: int = -10
    """The smallest scale, as a power of 2."""
    largest: int = 4
    """The largest."""
    level: float = 0.9
    """The share, 1 - |shift - first order|² / |shift|², whose loss is looked for."""
    rows: int = 4
    """Rows of a batch."""
    length: int = 96
    """Tokens of a row; several examples share one."""
    batches: int = 1
    """Batches that are measured; energies add up."""
    dtype: Literal["float32", "float64"] = "float64"
    """Of the whole computation. In float32 the remainders of higher orders drown in rounding."""
    out: str = "runs/theory/orders"
    """Folder of the figures and of orders.json."""

    def run(self) -> None:
        """Measure, draw, and write orders.json."""
        check_sites(self.sites)
        if self.order < 1 or self.largest <= self.smallest:
            raise ValueError(
                f"orders: order must be at least 1 and largest above smallest; got order {self.order}, "
                f"scales 2**{self.smallest} to 2**{self.largest}"
            )
        config = load_config_file(self.config, TrainConfig)
        loaded = load(config.model, "float32")
        batches = held_out(config, loaded, rows=self.rows, length=self.length, batches=self.batches)
        scales = 2.0 ** np.arange(self.smallest, self.largest + 1)
        total = len(self.tuned) * self.batches * (2**self.order + 2 * len(scales))
        found: dict[str, Remainders] = {}
        with (
            jax.enable_x64(True) if self.dtype == "float64" else nullcontext(),
            progress(total, "Measuring") as bar,
        ):
            done = 0

            def advance(passes: int) -> None:
                nonlocal done
                done += passes
                bar.update(done)

            for path in self.tuned:
                subject = read_subject(path, loaded)
                found[subject.name] = self._measure(subject, batches, scales, advance)
        self._report(found, config.model)

    def _measure(
        self, subject: Subject, batches: Any, scales: np.ndarray, advance: Callable[[int], None]
    ) -> Remainders:
        """Remainders at all scales, energies summed over the batches."""
        at, update = cast((subject.at, subject.update), self.dtype)
        expand = jax.jit(partial(higher_order, subject.model, sites=self.sites, order=self.order))
        measure = jax.jit(partial(remainders, subject.model))
        sums: list[Remainders] = []
        for batch in batches:
            terms = jax.block_until_ready(expand(at, update, batch))
            advance(2**self.order)
            parts = []
            for scale in scales:
                parts.append(jax.device_get(measure(at, update, batch, terms, scale[None])))
                advance(2)
            join = lambda *each, axis: np.concatenate(each, axis=axis)
            whole = jax.tree.map(partial(join, axis=0), *[part.shift for part in parts])
            left = jax.tree.map(partial(join, axis=1), *[part.remainder for part in parts])
            sums.append(Remainders(jnp.asarray(scales), whole, left))
        add = lambda *each: sum(each)
        return Remainders(
            jnp.asarray(scales),
            jax.tree.map(add, *[each.shift for each in sums]),
            jax.tree.map(add, *[each.remainder for each in sums]),
        )

    def _report(self, found: dict[str, Remainders], model: str) -> None:
        out = Path(self.out)
        out.mkdir(parents=True, exist_ok=True)
        data: dict[str, Any] = {"model": model, "level": self.level, "tokens": self.rows * self.length * self.batches}
        panels = []
        for name, each in found.items():
            shares = {order: jax.tree.map(np.asarray, explained(each, order)) for order in range(1, self.order + 1)}
            scales = np.asarray(each.scales)
            reaches = {
                order: {site: np.asarray(reach(scales, share[site], self.level)) for site in self.sites}
                for order, share in shares.items()
            }
            slopes = {order: _slopes(each, order) for order in shares}
            data[name] = {
                "scales": scales.tolist(),
                "explained": {str(k): {s: v.tolist() for s, v in share.items()} for k, share in shares.items()},
                "reach": {str(k): {s: _finite(v) for s, v in by.items()} for k, by in reaches.items()},
                "slopes": {str(k): v for k, v in slopes.items()},
            }
            at_sites = {site: (scales, np.clip(shares[1][site].mean(axis=1), 0, 1)) for site in self.sites}
            panels.append(
                Panel(at_sites, "scale of the update", "share explained", f"{name}, first order", "x", self.level)
            )
            self._draw_remainders(out / f"remainders_{name}.png", each, name, model)
            plot_by_layer(
                out / f"reach_{name}.png",
                {site: np.minimum(reaches[1][site], scales[-1]).tolist() for site in self.sites},
                ylabel=f"scale at which first order\nfalls below {100 * self.level:.0f} %",
                title=f"Reach of first order, {name} ({model})",
            )
            at_one = {site: np.median(shares[1][site][np.argmin(np.abs(scales - 1))]) for site in self.sites}
            print_facts(
                {
                    f"{name}: first order at scale 1": ", ".join(f"{s} {100 * v:.0f} %" for s, v in at_one.items()),
                    f"{name}: {100 * self.level:.0f} % up to scale": ", ".join(
                        f"{s} {np.median(v):.2g}" for s, v in reaches[1].items()
                    )
                    + " (medians over layers)",
                }
            )
        plot_lines(out / "share.png", panels, title=f"Share of the shift that first order explains ({model})")
        write_json(out / "orders.json", data)
        print(f"figures and orders.json: {out}")

    def _draw_remainders(self, path: Path, found: Remainders, name: str, model: str) -> None:
        """At each site the root of the energies summed over layers, relative to the shift at scale 1."""
        scales, one = np.asarray(found.scales), int(np.argmin(np.abs(found.scales - 1)))
        panels = []
        for site in self.sites:
            size = lambda energies: np.sqrt(np.sum(energies, axis=-1))
            whole = size(found.shift[site])
            series = {"shift": (scales, whole / whole[one])}
            for order in range(1, self.order + 1):
                left = size(found.remainder[site][order - 1]) / whole[one]
                series[f"left by order {order}"] = (scales, left)
                # A straight line of the exact slope through the middle of the window.
                middle = int(np.argmin(np.abs(np.log2(scales) - sum(WINDOW) / 2)))
                near = np.abs(np.log2(scales / scales[middle])) <= 4
                guide = left[middle] * (scales[near] / scales[middle]) ** (order + 1)
                series[f"_slope {order + 1}"] = (scales[near], guide)
            panels.append(Panel(series, "scale of the update", "size (shift at scale 1 = 1)", site, "xy"))
        plot_lines(path, panels, title=f"What each order leaves, {name} ({model}); dotted: slopes 2, 3, ...")


WINDOW = (-6, -3)
"""Powers of 2 between which slopes are taken."""


def _slopes(found: Remainders, order: int) -> dict[str, list[float]]:
    """{site: the slope of each layer's remainder over the window, [L]}."""
    powers = np.log2(found.scales)
    here = (powers >= WINDOW[0]) & (powers <= WINDOW[1])
    of = lambda left: log_slope(np.asarray(found.scales)[here], np.sqrt(left[order - 1][here]))
    return {site: np.asarray(of(left)).tolist() for site, left in found.remainder.items()}


def _finite(values: np.ndarray) -> list[float | None]:
    """None where a share never falls."""
    return [float(value) if np.isfinite(value) else None for value in values]
