"""How far a Taylor expansion in the update carries: the study `orders`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from jaxsteer.io.files import write_json
from jaxsteer.params import Params
from jaxsteer.theory import Remainders, explained, first_order, higher_order, only_layer, reach, remainders
from jaxsteer.theory.shifts import check_sites, log_slope
from jaxsteer.types import Array, Batch
from train.base_models import load
from train.cli import load_config_file
from train.config import TrainConfig
from train.display.console import print_facts, progress
from train.display.plots import Panel, plot_lines
from train.theory.subjects import Subject, cast, held_out, read_subject

WINDOW = (-11, -8)
"""Powers of 2 between which slopes are taken."""

TOGETHER = 5
"""Scales that are measured in one call."""

LOCAL = -4
"""The power of 2 at which the scales of one layer's update begin: first order reaches further there."""

Advance = Callable[[int], None]


@dataclass(frozen=True)
class Orders:
    """How much of a fine-tuning's activation shift its expansion to order 1, 2, 3 explains, at scales of the update.

    The update is scaled from far below to beyond what training made it (scale 1): the whole of it, with what one layer
    does to the next, and that of each layer alone, seen at that layer. Figures: remainders_NAME.png, what each order
    leaves against the scale, with slopes 2, 3, 4 where the expansion holds; share.png, the share that first order
    explains against the scale; reach.png, the scale up to which it explains 90 %, by layer and site.
    """

    tuned: tuple[str, ...] = ("runs/theory/lora/steering.safetensors", "runs/theory/full/model")
    """Fine-tunings: steering files (*.safetensors), or folders of fully fine-tuned models."""
    config: str = "configs/theory.py"
    """A config file: its model is the base, its task's test examples are what shifts are measured on."""
    sites: tuple[str, ...] = ("attn", "mlp.in", "mlp", "block")
    """Where shifts are measured."""
    order: int = 3
    """The highest order; it costs 2 ** order forward passes."""
    smallest: int = -12
    """The smallest scale, as a power of 2."""
    largest: int = 2
    """The largest."""
    level: float = 0.9
    """The share, 1 - |shift - first order|² / |shift|², whose loss is looked for."""
    local_every: int = 3
    """Measure the own update of every so many layers too, in float32; 0 = of none."""
    batch_size: int = 2
    """Rows of a batch."""
    sequence_length: int = 96
    """Tokens of a row; several examples share one."""
    batches: int = 1
    """Batches that are measured; energies add up."""
    dtype: Literal["float32", "float64"] = "float64"
    """Of the whole update's expansion. In float32 the remainders of higher orders drown in rounding."""
    out: str = "runs/theory/orders"
    """Folder of the figures and of orders.json."""

    @property
    def scales(self) -> np.ndarray:
        """Factors on the update."""
        return 2.0 ** np.arange(self.smallest, self.largest + 1)

    @property
    def local_scales(self) -> np.ndarray:
        """Those on the update of one layer."""
        return self.scales[self.scales >= 2.0**LOCAL]

    def run(self) -> None:
        """Measure, draw, and write orders.json.

        Raises:
            ValueError: settings that do not fit, a fine-tuning that is not there or is another model's.
        """
        check_sites(self.sites)
        if self.order < 1 or not self.smallest < 0 < self.largest:
            raise ValueError(
                f"orders: order must be at least 1, smallest below 0 and largest above; got order {self.order}, "
                f"scales 2**{self.smallest} to 2**{self.largest}"
            )
        config = load_config_file(self.config, TrainConfig)
        loaded = load(config.model, "float32")
        batches = held_out(config, loaded, rows=self.batch_size, length=self.sequence_length, batches=self.batches)
        subjects = [read_subject(path, loaded) for path in self.tuned]
        weights = [self.local_every > 0 and bool(jax.tree.leaves(subject.update.base)) for subject in subjects]
        layers = range(0, loaded.config.layers, self.local_every or 1)
        own = len(layers) * (3 + len(self.local_scales))
        whole = 2**self.order + len(self.scales) + -(-len(self.scales) // TOGETHER)
        data: dict[str, Any] = {
            "model": config.model,
            "level": self.level,
            "tokens": self.batch_size * self.sequence_length,
        }
        with progress(self.batches * (len(subjects) * whole + sum(weights) * own), "Forward passes") as bar:
            done = 0

            def advance(passes: int) -> None:
                nonlocal done
                done += passes
                bar.update(done)

            for subject, has_own in zip(subjects, weights, strict=True):
                with jax.enable_x64(True) if self.dtype == "float64" else nullcontext():
                    found = added([self._expand(subject, batch, advance) for batch in batches])
                    data[subject.name] = {"whole": self._summary(found, range(loaded.config.layers))}
                    self._draw_remainders(found, subject.name, config.model)
                if has_own:
                    found = added([self._each_layer(subject, batch, layers, advance) for batch in batches])
                    data[subject.name]["local"] = self._summary(found, layers)
        self._report(data)

    def _expand(self, subject: Subject, batch: Batch, advance: Advance) -> Remainders:
        """Of the whole update, at all orders and scales."""
        at, update = cast((subject.at, subject.update), self.dtype)
        expand = jax.jit(partial(higher_order, subject.model, sites=self.sites, order=self.order))
        measure = jax.jit(partial(remainders, subject.model))
        terms = jax.block_until_ready(expand(at, update, batch))
        advance(2**self.order)
        parts = []
        for some in np.array_split(self.scales, -(-len(self.scales) // TOGETHER)):
            parts.append(jax.device_get(measure(at, update, batch, terms, some)))
            advance(1 + len(some))
        join = lambda axis: lambda *each: np.concatenate(each, axis=axis)
        whole = jax.tree.map(join(0), *[part.shift for part in parts])
        return Remainders(jnp.asarray(self.scales), whole, jax.tree.map(join(1), *[part.remainder for part in parts]))

    def _each_layer(self, subject: Subject, batch: Batch, layers: Sequence[int], advance: Advance) -> Remainders:
        """Of each layer's own update, at that layer, first order only."""

        @jax.jit
        def measure(at: Params, update: Params, layer: Array) -> Remainders:
            own = only_layer(update, layer)
            terms = (first_order(subject.model, at, own, batch, self.sites),)
            found = remainders(subject.model, at, own, batch, terms, self.local_scales.astype(np.float32))
            here = lambda energies: energies[..., layer]
            return Remainders(found.scales, jax.tree.map(here, found.shift), jax.tree.map(here, found.remainder))

        parts = []
        for layer in layers:
            parts.append(jax.device_get(measure(subject.at, subject.update, jnp.asarray(layer))))
            advance(3 + len(self.local_scales))
        stack = lambda *each: np.stack(each, axis=-1)
        whole = jax.tree.map(stack, *[part.shift for part in parts])
        return Remainders(parts[0].scales, whole, jax.tree.map(stack, *[part.remainder for part in parts]))

    def _summary(self, found: Remainders, layers: Sequence[int]) -> dict[str, Any]:
        """Shares [S][L], the scale that each order reaches [L] (None = beyond all), slopes [L]; by order and site."""
        orders = range(1, next(iter(found.remainder.values())).shape[0] + 1)
        shares = {str(k): {s: np.asarray(v) for s, v in explained(found, k).items()} for k in orders}
        far = lambda share: [float(v) if np.isfinite(v) else None for v in reach(found.scales, share, self.level)]
        return {
            "layers": list(layers),
            "scales": np.asarray(found.scales).tolist(),
            "share": {k: {site: v.tolist() for site, v in by.items()} for k, by in shares.items()},
            "reach": {k: {site: far(v) for site, v in by.items()} for k, by in shares.items()},
            "slope": {str(k): _slopes(found, k) for k in orders},
        }

    def _draw_remainders(self, found: Remainders, name: str, model: str) -> None:
        """At each site the root of the energies summed over layers, relative to the shift at scale 1."""
        scales, one = self.scales, -self.smallest
        middle = int(np.argmin(np.abs(np.log2(scales) - sum(WINDOW) / 2)))
        near = slice(max(0, middle - 3), middle + 6)
        panels = []
        for site in self.sites:
            size = lambda energies: np.sqrt(np.sum(energies, axis=-1))
            whole = size(found.shift[site])
            series = {"shift": (scales, whole / whole[one])}
            for order in range(1, self.order + 1):
                left = size(found.remainder[site][order - 1]) / whole[one]
                series[f"left by order {order}"] = (scales, left)
                guide = left[middle] * (scales[near] / scales[middle]) ** (order + 1)
                series[f"_{order}"] = (scales[near], guide)
            panels.append(Panel(series, "scale of the update", "size (shift at 1 = 1)", site, "xy"))
        path = self._folder() / f"remainders_{name}.png"
        plot_lines(path, panels, title=f"What each order leaves: {name} ({model}); dotted: powers 2, 3, ...")

    def _report(self, data: dict[str, Any]) -> None:
        """Figures and facts of all fine-tunings."""
        share, reaching = [], []
        for name, subject in data.items():
            if not isinstance(subject, dict):
                continue
            for kind, title in (("whole", "the whole update"), ("local", "each layer's own")):
                if kind not in subject:
                    continue
                found, title = subject[kind], f"{name}, {title}"
                scales, first = found["scales"], {s: np.array(v) for s, v in found["share"]["1"].items()}
                means = {site: (scales, np.clip(np.median(v, axis=1), 0, 1)) for site, v in first.items()}
                share.append(Panel(means, "scale of the update", "share explained", title, "x", self.level))
                reached = {s: [scales[-1] if v is None else v for v in far] for s, far in found["reach"]["1"].items()}
                lines = {site: (found["layers"], v) for site, v in reached.items()}
                reaching.append(Panel(lines, "layer", "scale reached", title, "y", 1.0))
                one = scales.index(1.0)
                print_facts(
                    {
                        f"{title}, share at scale 1": _medians({s: v[one] for s, v in first.items()}),
                        f"{title}, {100 * self.level:.0f} % up to scale": _medians(reached),
                    }
                    | ({f"{title}, slopes": _slope_facts(found["slope"])} if kind == "whole" else {})
                )
        model = data["model"]
        plot_lines(
            self._folder() / "share.png", share, title=f"Share explained by first order, layers' median ({model})"
        )
        title = f"Scale up to which first order explains {100 * self.level:.0f} % ({model})"
        plot_lines(self._folder() / "reach.png", reaching, title=title)
        write_json(self._folder() / "orders.json", data)
        print(f"figures and orders.json: {self._folder()}")

    def _folder(self) -> Path:
        out = Path(self.out)
        out.mkdir(parents=True, exist_ok=True)
        return out


def added(found: Sequence[Remainders]) -> Remainders:
    """The energies of several batches together."""
    add = lambda *each: sum(each)
    whole = jax.tree.map(add, *[each.shift for each in found])
    return Remainders(found[0].scales, whole, jax.tree.map(add, *[each.remainder for each in found]))


def _slopes(found: Remainders, order: int) -> dict[str, list[float]]:
    """{site: the slope of each layer's remainder over the window, [L]}; nothing where no scale lies in it."""
    powers = np.log2(np.asarray(found.scales))
    here = (powers >= WINDOW[0]) & (powers <= WINDOW[1])
    if here.sum() < 2:
        return {}
    of = lambda left: log_slope(np.asarray(found.scales)[here], np.sqrt(left[order - 1][here]))
    return {site: np.asarray(of(left)).tolist() for site, left in found.remainder.items()}


def _medians(values: dict[str, Any]) -> str:
    return ", ".join(f"{site} {np.median(value):.2g}" for site, value in values.items()) + " (layers' medians)"


def _slope_facts(slopes: dict[str, dict[str, list[float]]]) -> str:
    return ", ".join(
        f"order {order} {np.median(all_of):.2f}" for order, by in slopes.items() if (all_of := list(by.values()))
    )
