"""Lazy against full dynamics: the study `tangent`."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxsteer.io.files import write_json
from jaxsteer.models.transformer import Model
from jaxsteer.objective import supervised_loss, total_weight
from jaxsteer.params import Params, combine
from jaxsteer.theory import explained, first_order, remainders, tangent_loss
from jaxsteer.training import train_step
from jaxsteer.types import Array, Batch
from train.base_models import load
from train.cli import load_config_file
from train.config import TrainConfig
from train.display.console import print_facts, progress
from train.display.plots import Panel, plot_lines
from train.run.training import Training, make_training
from train.theory.subjects import held_out


@dataclass(frozen=True)
class Tangent:
    """Train a model and its tangent at the start, on the same batches by the same optimizer, and compare them.

    The tangent model's logits are linear in what trains, so its features stay as they were: where it keeps up with the
    full model the dynamics are lazy. Held-out losses of both, of the tangent run's parameters in the full model, and of
    the full run's in the tangent model; and the share of the full run's activation shift that is first order in the way
    it went.
    """

    config: str = "configs/theory.py"
    """A config file: model, task, optimizer, rows."""
    plan: tuple[str, ...] = ()
    """What trains instead of the config's plan."""
    lr: float | None = None
    """Learning rate instead of the config's."""
    steps: int = 77
    """Updates."""
    every: int = 7
    """Steps between measurements."""
    batch_size: int = 4
    """Rows of the held-out batch."""
    sequence_length: int = 96
    """Tokens of each."""
    out: str = "runs/theory/tangent"
    """Folder of tangent.png and tangent.json."""

    def run(self) -> None:
        """Train both, draw, and write tangent.json."""
        if self.steps < 1 or self.every < 1:
            raise ValueError(f"tangent: steps and every must be at least 1; got {self.steps} and {self.every}")
        config = load_config_file(self.config, TrainConfig)
        config = replace(config, steps=self.steps, plan=self.plan or config.plan)
        if self.lr is not None:
            config = replace(config, optim=replace(config.optim, lr=self.lr))
        loaded = load(config.model, "float32")
        training = make_training(config, loaded)
        (batch,) = held_out(config, loaded, rows=self.batch_size, length=self.sequence_length, batches=1)
        out = Path(self.out)
        out.mkdir(parents=True, exist_ok=True)
        rows = self._train(config, training, batch)
        data = {"model": config.model, "plan": list(config.plan), "lr": config.optim.lr, "rows": rows}
        write_json(out / "tangent.json", data)
        self._draw(out / "tangent.png", rows, f"{', '.join(config.plan)} ({config.model})")
        last = rows[-1]
        print_facts({name: f"{last[name]:.4f}" for name in (*LOSSES, "explained")})
        print(f"figure and tangent.json: {out}")

    def _train(self, config: TrainConfig, training: Training, held: Batch) -> list[dict[str, Any]]:
        # The step donates nothing: both runs start from the same arrays.
        step = partial(train_step, model=training.model, tx=training.tx, orthogonality=training.orthogonality)
        full_step = jax.jit(step)
        lazy_step = jax.jit(
            lambda state, batch, frozen, at: step(state, batch, frozen, loss=partial(tangent_loss, at=at))
        )
        look = jax.jit(partial(compare, training.model))
        at, frozen = training.state.params, training.frozen
        full = lazy = training.state
        rows = []
        with progress(self.steps, "Training both") as bar:
            for done in range(self.steps + 1):
                if done % self.every == 0 or done == self.steps:
                    found = {k: float(v) for k, v in look(at, frozen, full.params, lazy.params, held).items()}
                    rows.append({"step": done, **found})
                if done == self.steps:
                    break
                batch = training.batch(config, done)
                full, metrics = full_step(full, batch, frozen)
                lazy, lazy_metrics = lazy_step(lazy, batch, frozen, at)
                bar.update(done + 1, loss=float(metrics.loss), lazy_loss=float(lazy_metrics.loss))
        return rows

    def _draw(self, path: Path, rows: list[dict[str, Any]], title: str) -> None:
        steps = [row["step"] for row in rows]
        losses = {label: (steps, [row[name] for row in rows]) for name, label in LOSSES.items()}
        share = {"block": (steps, [row["explained"] for row in rows])}
        panels = [
            Panel(losses, "step", "held-out loss\n(nats per token)"),
            Panel(share, "step", "share of the shift\nthat is first order"),
        ]
        plot_lines(path, panels, title=title)


LOSSES = {
    "full": "full run",
    "lazy": "tangent run",
    "lazy_in_full": "tangent run's parameters in the full model",
    "full_in_lazy": "full run's parameters in the tangent model",
}


def compare(model: Model, at: Params, frozen: Params, full: Params, lazy: Params, batch: Batch) -> dict[str, Array]:
    """Mean losses of both runs in both models, and how much of the full run's shift its first order explains.

    The share is that at site `block`, a mean over layers; NaN before anything has moved.
    """
    total = total_weight(batch)
    in_full = lambda params: supervised_loss(model, *combine(params, frozen), batch) / total
    in_lazy = lambda params: tangent_loss(model, *combine(params, frozen), batch, at=at) / total
    way = jax.tree.map(jnp.subtract, full, at)
    whole = combine(at, frozen)
    terms = (first_order(model, whole, way, batch, ("block",)),)
    share = explained(remainders(model, whole, way, batch, terms, np.ones(1, np.float32)))["block"][0]
    return {
        "full": in_full(full),
        "lazy": in_lazy(lazy),
        "lazy_in_full": in_full(lazy),
        "full_in_lazy": in_lazy(full),
        "explained": jnp.mean(share),
    }
