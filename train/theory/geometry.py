"""Spectra of shifts, steering and LoRA, and the angles between their subspaces: the study `geometry`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxsteer.io import load_steering
from jaxsteer.theory.geometry import (
    chance,
    directions_for,
    effective_rank,
    map_directions,
    subspace_overlap,
    top_directions,
)
from jaxsteer.theory.oracle import oracle_steering
from jaxsteer.theory.predict import site_gradients
from jaxsteer.types import Array
from train.display.console import progress
from train.display.plots import plot_by_layer
from train.theory.subjects import Pair, counter, read_pair, write_result


@dataclass(frozen=True)
class GeometryStudy:
    """How many directions a fine-tuning's shifts, LoRA and steering have in each layer, and how far they share them:
    the oracle's top directions, what LoRA writes to the residual stream, what steering reads and writes, and the
    gradient's top directions at the base model. Figures: ranks.png, overlaps.png.
    """

    tuned: str = "runs/theory/lora/steering.safetensors"
    """The fine-tuning: a steering file, or a folder of a fully fine-tuned model."""
    config: str = "configs/theory.py"
    """The config file that it was trained with: names the base and the task."""
    steering: str | None = None
    """A file of post-block steering to be compared with it (trained, or of the study `convert`)."""
    rank: int = 8
    """Directions of the oracle and of the gradient."""
    examples: int = 120
    """Test examples."""
    batch_size: int = 8
    """Rows of a batch."""
    sequence_length: int = 96
    """Tokens of a row."""
    out: str = "runs/theory/geometry"
    """Folder of the figures and of geometry.json."""

    def run(self) -> None:
        """Measure, draw and write geometry.json.

        Raises:
            ValueError: a file that is not there or belongs to another model.
        """
        pair = read_pair(self.tuned, self.config)
        shifts, gradients = self._observe(pair)
        ranks: dict[str, Array] = {
            "oracle's increments": effective_rank(shifts.values),
            "gradients": effective_rank(gradients.values),
        }
        spans = {"oracle": shifts.rows[:, : self.rank], "gradient": gradients.rows[:, : self.rank]}
        for name, kind in ((self.tuned, "LoRA"), (self.steering, "steering")):
            if name is None or Path(name).is_dir():
                continue
            file = pair.file if name == self.tuned and pair.file is not None else load_steering(name)
            file.check(pair.loaded.config)
            for (_, site), (inputs, outputs) in map_directions(file.plan, file.steering).items():
                if site not in ("mlp.down", "attn.o", "block") or len(outputs.rows) != len(shifts.rows):
                    continue
                ranks[f"{kind} at {site}"] = effective_rank(outputs.values)
                spans[f"{kind} writes, {site}"] = outputs.rows
                if site == "block":
                    spans[f"{kind} reads, {site}"] = inputs.rows
        names = list(spans)
        pairs = [(a, b) for i, a in enumerate(names) for b in names[i + 1 :]]
        overlaps = {f"{a} · {b}": subspace_overlap(spans[a], spans[b]) for a, b in pairs}
        chances = {f"{a} · {b}": chance(spans[a], spans[b]) for a, b in pairs}
        plain = lambda values: {name: np.asarray(each).tolist() for name, each in values.items()}
        data = {
            "tokens": int(self.examples),
            "effective_rank": plain(ranks),
            "directions_for_90": plain({"oracle's increments": directions_for(shifts.values)}),
            "overlap": plain(overlaps),
            "chance": chances,
            "mean_overlap": {name: float(np.mean(each)) for name, each in overlaps.items()},
        }
        folder = write_result(self.out, "geometry", data).parent
        draw = lambda name, series, ylabel, title: plot_by_layer(
            folder / name, plain(series), ylabel=ylabel, title=title
        )
        draw("ranks.png", ranks, "effective rank", "Over how many directions the energy is spread")
        shown = {name: each for name, each in overlaps.items() if name.startswith("oracle")}
        draw("overlaps.png", shown, "mean cos² of principal angles", f"Overlap with the oracle's top {self.rank}")
        print(f"figures and numbers: {folder}")

    def _observe(self, pair: Pair) -> tuple[Any, Any]:
        """Directions of the oracle's increments, and of the gradients at the base model, in every layer."""
        batches = pair.batches("test", self.examples, rows=self.batch_size, length=self.sequence_length)
        increments = jax.jit(oracle_steering)
        gradients_of = jax.jit(lambda network, batch: site_gradients(network, batch, ("block",))[1]["block"])
        seen: tuple[list, list] = [], []
        with progress(2 * len(batches), "Measuring") as bar:
            tick = counter(bar.update)
            for batch in batches:
                real = np.asarray(batch.segments > 0)
                for kept, values in zip(
                    seen, (increments(pair.base, pair.tuned, batch), gradients_of(pair.base, batch)), strict=True
                ):
                    kept.append(np.asarray(values)[:, real])
                    tick()
        shifts, gradients = (jax.lax.map(top_directions, jnp.asarray(np.concatenate(kept, axis=1))) for kept in seen)
        return shifts, gradients
