"""Lazy against full training dynamics: the study `tangent`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from jaxsteer.models.transformer import Model
from jaxsteer.objectives.supervised import Supervised, supervised_loss
from jaxsteer.objectives.tokens import total_weight
from jaxsteer.params import Params, combine
from jaxsteer.ranges import Count, Positive
from jaxsteer.theory import explained, first_order, remainders, tangent_loss
from jaxsteer.training import train_step
from jaxsteer.types import Array, Batch
from train.config import TrainConfig
from train.display.console import progress
from train.display.plots import Panel, plot_lines
from train.run.training import Training, make_training
from train.theory.study import Data, Row, Study
from train.theory.subjects import read_base

LOSSES = {
    "full": "full run",
    "lazy": "tangent run",
    "lazy_in_full": "tangent run's parameters in the full model",
    "full_in_lazy": "full run's parameters in the tangent model",
}
"""Held-out losses that are compared, and their labels."""


@dataclass(frozen=True, kw_only=True)
class TangentStudy(Study):
    """Train a model and its tangent at the start, on the same batches with the same optimizer, and compare them.

    The tangent model's logits are linear in what trains, so its features do not move: where it keeps up with the full
    model, the dynamics are lazy. Measured are the held-out losses of both runs, of the tangent run's parameters in the
    full model and of the full run's in the tangent model; and the share of the full run's activation shift that is
    first order in the change of its parameters. Figure: tangent.png.
    """

    name = "tangent"
    title = "Held-out losses after training, nats per token"

    plan: tuple[str, ...] = ()
    """Steering plan to train; default: the config's."""
    lr: Positive | None = None
    """Learning rate; default: the config's."""
    steps: Count = 77
    """Number of training steps."""
    every: Count = 7
    """Steps between measurements."""
    batch_size: Count = 4
    """Rows of the held-out batch."""
    sequence_length: Count = 96
    """Tokens per row of the held-out batch."""
    out: str = "runs/theory/tangent"
    """Output folder for tangent.png and tangent.json."""

    def measure(self) -> Data:
        """Train both, and measure every few steps."""
        base = read_base(self.config, plan=self.plan, splits=("test",))
        config = replace(base.config, steps=self.steps, plan=self.plan or base.config.plan)
        if self.lr is not None:
            config = replace(config, optim=replace(config.optim, lr=self.lr))
        training = make_training(config, base.loaded)
        rows = {"batch_size": self.batch_size, "sequence_length": self.sequence_length}
        (held_out,) = base.training_batches("test", 1, **rows)
        measurements = self._train(config, training, held_out)
        return {"model": config.model, "plan": list(config.plan), "lr": config.optim.lr, "rows": measurements}

    def draw(self, data: Data, folder: Path) -> None:
        """The losses, and the share of the shift that is first order, over the steps."""
        steps = [row["step"] for row in data["rows"]]
        losses = {label: (steps, [row[name] for row in data["rows"]]) for name, label in LOSSES.items()}
        share = {"block": (steps, [row["explained"] for row in data["rows"]])}
        panels = [
            Panel(losses, "step", "held-out loss\n(nats per token)"),
            Panel(share, "step", "share of the shift\nthat is first order"),
        ]
        plot_lines(folder / "tangent.png", panels, title=f"{', '.join(data['plan'])} ({data['model']})")

    def rows(self, data: Data) -> Sequence[Row]:
        """The losses and the share after the last step."""
        labels = LOSSES | {"explained": "share of the shift that is first order"}
        return [{"": label, f"step {self.steps}": f"{data['rows'][-1][name]:.4f}"} for name, label in labels.items()]

    def _train(self, config: TrainConfig, training: Training, held_out: Batch) -> list[dict[str, float]]:
        # These steps donate nothing: both runs start from the same arrays.
        program = training.program
        step = partial(train_step, model=program.model, tx=program.tx, orthogonality=program.orthogonality)
        full_step = jax.jit(step)
        tangent = lambda at: Supervised(partial(tangent_loss, at=at))
        lazy_step = jax.jit(lambda state, batch, frozen, at: step(state, batch, frozen, objective=tangent(at)))
        compare_runs = jax.jit(partial(compare, program.model))
        at, frozen = training.state.params, training.frozen
        full = lazy = training.state
        rows = []
        with progress(self.steps, "Training both") as bar:
            for done in range(self.steps + 1):
                if done % self.every == 0 or done == self.steps:
                    values = compare_runs(at, frozen, full.params, lazy.params, held_out)
                    rows.append({"step": done} | {name: float(value) for name, value in values.items()})
                if done == self.steps:
                    break
                batch = training.batch(done)
                full, metrics = full_step(full, batch, frozen)
                lazy, lazy_metrics = lazy_step(lazy, batch, frozen, at)
                bar.update(done + 1, loss=float(metrics.loss), lazy_loss=float(lazy_metrics.loss))
        return rows


def compare(model: Model, at: Params, frozen: Params, full: Params, lazy: Params, batch: Batch) -> dict[str, Array]:
    """Mean losses of both runs in both models, and how much of the full run's shift first order explains.

    Args:
        model: static.
        at: the trained leaves where both runs started; `frozen`: the others.
        full: the trained leaves of the full run; `lazy`: of the tangent run.
        batch: held-out rows.

    Returns:
        Scalars by the names of `LOSSES`, and "explained": the share at site `block`, a mean over layers; NaN before
        anything has moved.
    """
    total = total_weight(batch)
    in_full = lambda params: supervised_loss(model, *combine(params, frozen), batch) / total
    in_lazy = lambda params: tangent_loss(model, *combine(params, frozen), batch, at=at) / total
    delta = jax.tree.map(jnp.subtract, full, at)
    start = combine(at, frozen)
    terms = (first_order(model, start, delta, batch, ("block",)),)
    share = explained(remainders(model, start, delta, batch, terms, np.ones(1, np.float32)))["block"][0]
    return {
        "full": in_full(full),
        "lazy": in_lazy(lazy),
        "lazy_in_full": in_full(lazy),
        "full_in_lazy": in_lazy(full),
        "explained": jnp.mean(share),
    }
