"""What the gradients at the base model predict, against what training finds: the study `predict`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import jax
import numpy as np
from scipy.stats import spearmanr

from jaxsteer.models.transformer import Network
from jaxsteer.objectives.supervised import supervised_loss
from jaxsteer.objectives.tokens import total_weight
from jaxsteer.plans import parse_plan
from jaxsteer.ranges import Count, NonNegative, Positive
from jaxsteer.steering import init_steering
from jaxsteer.theory import Promise, aligned_start, gradient_factors, promise
from jaxsteer.theory.predict import STREAM_SITES
from jaxsteer.types import Array, Batch, Steering
from train.display.plots import plot_by_layer
from train.run.training import Training, make_training
from train.theory.study import Data, Row, Study, Ticker, ticking
from train.theory.subjects import Base, read_base

RANKS = (1, 2, 4, 8, 16, 32)
"""Ranks of linear maps whose promise is recorded, beside that of the plan."""
HELD_OUT_BATCHES, HELD_OUT_ROWS = 4, 2
"""Validation batches, and rows of each, that the loss is measured on."""

Start = Callable[[Training, int], Steering]
"""(a run, its seed) -> the steering that it starts from."""


@dataclass(frozen=True, kw_only=True)
class PredictStudy(Study):
    """Which layers and sites are worth steering according to the gradients of a few batches at the base model, and
    according to training steering at one layer or one site alone; and whether initialising D along the gradient's
    directions trains faster. Figures: promise.png, layers.png, starts.png.
    """

    name = "predict"
    title = "Rank correlation with the fall of the loss, over layers"

    plan: str = "nonlinear(rank=8) @ {site}"
    """Steering to train, with {site} in place of the site."""
    lr: Positive = 5e-3
    """Learning rate."""
    batches: Count = 4
    """Number of training batches to take the gradients from."""
    batch_size: Count = 8
    """Rows per batch of the gradients."""
    steps: Count = 20
    """Steps of each training run."""
    every: Count = 5
    """Train at every N-th layer alone, and at the last."""
    seeds: Count = 1
    """Training runs from each start."""
    ridge: NonNegative = 1e-3
    """Ridge penalty of the fits, see `jaxsteer.theory.predict.promise`."""
    out: str = "runs/theory/predict"
    """Output folder for the figures and predict.json."""

    def measure(self) -> Data:
        """Predict, then train."""
        plan = [self.plan.replace("{site}", "block")]
        base = read_base(self.config, plan=plan, splits=("train", "validation"))
        length, last = base.config.sequence_length, base.loaded.config.layers - 1
        batches = base.full_batches("train", self.batches, batch_size=self.batch_size, sequence_length=length)
        held_out = base.full_batches("validation", HELD_OUT_BATCHES, batch_size=HELD_OUT_ROWS, sequence_length=length)
        layers = sorted({*range(0, last, self.every), last})
        rank = self._rank(base)
        runs = len(layers) + len(STREAM_SITES) + 2 * self.seeds
        with ticking(len(batches) + runs * self.steps, "Predicting and training") as tick:
            factors = gradient_factors(base.network, batches, advance=tick)
            promises = {site: _promised(promise(factors[site], self.ridge), rank) for site in STREAM_SITES}
            before = _mean_loss(base.network, held_out)

            def train(site: str, seed: int = 0, start: Start | None = None) -> tuple[float, list[float]]:
                return self._train(base, held_out, site, seed, start, tick)

            def aligned(training: Training, seed: int) -> Steering:
                plan = training.program.model.plan
                fresh = init_steering(plan, base.loaded.config, jax.random.key(seed))
                return aligned_start(plan, fresh, factors, self.ridge)

            at_layers = [before - train(f"block layers={layer}")[0] for layer in layers]
            at_sites = {site: before - train(site)[0] for site in STREAM_SITES}
            starts = {
                name: [train("block", seed, start) for seed in range(self.seeds)]
                for name, start in (("drawn D", None), ("aligned D", aligned))
            }
        data: Data = {
            "layers": layers,
            "steps": self.steps,
            "rank": rank,
            "promise": promises,
            "loss before": before,
            "fall at one layer": at_layers,
            "fall at one site": at_sites,
            "starts": {
                name: {"held-out loss": [held for held, _ in runs], "training loss": [losses for _, losses in runs]}
                for name, runs in starts.items()
            },
        }
        return data | {"rank correlation over layers": correlations(data)}

    def draw(self, data: Data, folder: Path) -> None:
        """What each site promises, one layer alone, and training from both starts."""
        rank, block = f"rank {data['rank']}", data["promise"]["block"]
        plot_by_layer(
            folder / "promise.png",
            {site: np.sqrt(promised[rank]).tolist() for site, promised in data["promise"].items()},
            ylabel="first-order fall of the loss\nfor shifts of norm 1",
            title=f"What a linear map of {rank} promises at each site",
        )
        expected, measured = np.sqrt(block[rank]), np.full(len(block["energy"]), np.nan)
        measured[data["layers"]] = np.array(data["fall at one layer"]) / max(data["fall at one layer"])
        plot_by_layer(
            folder / "layers.png",
            {
                "promised, largest = 1": (expected / expected.max()).tolist(),
                f"after {data['steps']} steps, largest = 1": measured.tolist(),
                "share of the gradient's energy": (np.array(block[rank]) / np.array(block["energy"])).tolist(),
            },
            ylabel="fall of the loss",
            title="Post-block steering at one layer alone",
        )
        plot_by_layer(
            folder / "starts.png",
            {name: np.mean(start["training loss"], axis=0).tolist() for name, start in data["starts"].items()},
            xlabel="step",
            ylabel="training loss",
            title="Post-block steering from a drawn and from an aligned D",
        )

    def rows(self, data: Data) -> Sequence[Row]:
        """A row per prediction."""
        found = data["rank correlation over layers"]
        return [{"prediction": name, "rank correlation": f"{value:.2f}"} for name, value in found.items()]

    def _rank(self, base: Base) -> int:
        """Rank of the steering that is trained."""
        (slot,) = parse_plan([self.plan.replace("{site}", "block")], base.loaded.config)
        rank = getattr(slot.method, "rank", None)
        if rank is None:
            raise ValueError(f"predict: --plan {self.plan!r} has no rank; use a method with D and U, such as nonlinear")
        return rank

    def _train(
        self, base: Base, held_out: Sequence[Batch], site: str, seed: int, start: Start | None, tick: Ticker
    ) -> tuple[float, list[float]]:
        """(held-out loss after training at a site, training loss of each step)."""
        config = replace(
            base.config,
            plan=(self.plan.replace("{site}", site),),
            optim=replace(base.config.optim, lr=self.lr),
            steps=self.steps,
            seed=seed,
        )
        training = make_training(config, base.loaded)
        if start is not None:
            training = training.starting_from(start(training, seed))
        state, losses = training.state, []
        for step in range(training.steps):
            state, metrics = training.step(state, training.batch(step))
            losses.append(float(metrics.loss))
            tick()
        return _mean_loss(Network(training.program.model, *training.params(state)), held_out), losses


def correlations(data: Data) -> dict[str, float]:
    """Spearman's rank correlation of each prediction with the fall that training found, over the layers trained alone.

    Args:
        data: what `PredictStudy.measure` returns.
    """
    rank = f"rank {data['rank']}"
    block = {name: np.array(values)[data["layers"]] for name, values in data["promise"]["block"].items()}
    predictions = {
        f"promise of {rank}": block[rank],
        "energy": block["energy"],
        f"share of the energy that {rank} reaches": block[rank] / block["energy"],
    }
    return {name: float(spearmanr(values, data["fall at one layer"]).statistic) for name, values in predictions.items()}


def _promised(promised: Promise, rank: int) -> dict[str, list[float]]:
    """What each layer promises: in all, to a fixed vector, and to linear maps of `RANKS` and of `rank`."""
    width = promised.ranks.shape[1]
    ranks = {f"rank {r}": promised.ranks[:, r - 1] for r in sorted({*RANKS, rank}) if r <= width}
    values = {"energy": promised.energy, "fixed": promised.fixed, **ranks}
    return {name: np.asarray(array).tolist() for name, array in values.items()}


@jax.jit
def _loss_and_weight(network: Network, batch: Batch) -> tuple[Array, Array]:
    loss = supervised_loss(network.model, network.base, network.steering, batch)
    return loss, total_weight(batch)


def _mean_loss(network: Network, batches: Sequence[Batch]) -> float:
    """Mean loss per supervised token, nats."""
    losses, weights = zip(*(_loss_and_weight(network, batch) for batch in batches), strict=True)
    return float(np.sum(losses) / np.sum(weights))
