"""Spectra of shifts, steering and LoRA, and the angles between their subspaces: the study `geometry`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from jaxsteer.models.transformer import Network
from jaxsteer.ranges import Count
from jaxsteer.theory import oracle_steering, site_gradients
from jaxsteer.theory.geometry import (
    Directions,
    chance,
    directions_for,
    effective_rank,
    map_directions,
    subspace_overlap,
    top_directions,
)
from jaxsteer.types import Array, Batch
from train.display.plots import plot_by_layer
from train.theory.study import Data, PairStudy, Row, ticking
from train.theory.subjects import Base, count_examples, count_tokens, in_run, read_steering

STREAM_WRITERS = ("mlp.down", "attn.o", "block")
"""Sites whose maps write to the residual stream."""


@dataclass(frozen=True, kw_only=True)
class GeometryStudy(PairStudy):
    """How many directions a fine-tuning's shifts, LoRA and steering have in each layer, and how far they share them:
    the oracle's top directions, what LoRA writes to the residual stream, what steering reads and writes, and the
    gradient's top directions at the base model. Figures: ranks.png, overlaps.png.
    """

    name = "geometry"
    title = "Subspaces, means over layers"

    steering: str | None = None
    """A file of post-block steering to compare with the fine-tuning (trained, or from the study `convert`)."""
    rank: Count = 8
    """Number of directions of the oracle and of the gradient."""
    out: str = "runs/theory/geometry"
    """Output folder for the figures and geometry.json."""

    @property
    def compared(self) -> list[str]:
        """The fine-tuning and, if it is given, the file to compare with it."""
        return [self.tuned, *([] if self.steering is None else [self.steering])]

    def measure(self) -> Data:
        """Effective ranks and overlaps, layer by layer."""
        base, tuned = self.read()
        batches = self.test_batches(base)
        shifts, gradients = _observe(base.network, tuned, batches)
        ranks = {
            "oracle's increments": effective_rank(shifts.values),
            "gradients": effective_rank(gradients.values),
        }
        spans = {"oracle": shifts.rows[:, : self.rank], "gradient": gradients.rows[:, : self.rank]}
        for kind, site, inputs, outputs in self._maps(base):
            ranks[f"{kind} at {site}"] = effective_rank(outputs.values)
            spans[f"{kind} writes, {site}"] = outputs.rows
            if site == "block":
                spans[f"{kind} reads, {site}"] = inputs.rows
        pairs = {f"{one} · {other}": (spans[one], spans[other]) for one, other in combinations(spans, 2)}
        overlaps = {name: subspace_overlap(*pair) for name, pair in pairs.items()}
        return {
            "tokens": count_tokens(batches),
            "examples": count_examples(batches),
            "effective_rank": _lists(ranks),
            "directions_for_90": _lists({"oracle's increments": directions_for(shifts.values)}),
            "overlap": _lists(overlaps),
            "chance": {name: chance(*pair) for name, pair in pairs.items()},
            "mean_overlap": {name: float(np.mean(overlap)) for name, overlap in overlaps.items()},
        }

    def draw(self, data: Data, folder: Path) -> None:
        """Effective ranks, and overlaps with the oracle's top directions, by layer."""
        plot_by_layer(
            folder / "ranks.png",
            data["effective_rank"],
            ylabel="effective rank",
            title="Over how many directions the energy is spread",
        )
        plot_by_layer(
            folder / "overlaps.png",
            {name: overlap for name, overlap in data["overlap"].items() if name.startswith("oracle")},
            ylabel="mean cos² of principal angles",
            title=f"Overlap with the oracle's top {self.rank}",
        )

    def rows(self, data: Data) -> Sequence[Row]:
        """A row per pair of subspaces."""
        return [
            {"subspaces": name, "overlap": f"{mean:.3f}", "by chance": f"{data['chance'][name]:.3f}"}
            for name, mean in data["mean_overlap"].items()
        ]

    def _maps(self, base: Base) -> Iterator[tuple[str, str, Directions, Directions]]:
        """(kind, site, inputs, outputs) of the low-rank maps that the files write to the stream with in every layer."""
        for path, kind in ((self.tuned, "LoRA"), (self.steering, "steering")):
            if path is None or in_run(path).is_dir():
                continue
            file = read_steering(str(in_run(path)), base)
            for (_, site), (inputs, outputs) in map_directions(file.plan, file.steering).items():
                if site in STREAM_WRITERS and len(outputs.rows) == base.loaded.config.layers:
                    yield kind, site, inputs, outputs


def _observe(base: Network, tuned: Network, batches: Sequence[Batch]) -> tuple[Directions, Directions]:
    """Directions of the oracle's increments, and of the gradients at the base model, in every layer."""
    increments_of = jax.jit(oracle_steering)
    gradients_of = jax.jit(lambda network, batch: site_gradients(network, batch, ("block",))[1]["block"])
    increments, gradients = [], []
    with ticking(2 * len(batches), "Measuring") as tick:
        for batch in batches:
            real = np.asarray(batch.segments > 0)
            increments.append(np.asarray(increments_of(base, tuned, batch))[:, real])
            tick()
            gradients.append(np.asarray(gradients_of(base, batch))[:, real])
            tick()
    directions = lambda tokens: jax.lax.map(top_directions, jnp.asarray(np.concatenate(tokens, axis=1)))
    return directions(increments), directions(gradients)


def _lists(values: Mapping[str, Array]) -> dict[str, list[float]]:
    return {name: np.asarray(array).tolist() for name, array in values.items()}
