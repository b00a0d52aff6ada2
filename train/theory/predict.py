"""What the gradients at the base model foretell, against what training finds: the study `predict`."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from scipy.stats import spearmanr

from jaxsteer.models.transformer import Model, Network
from jaxsteer.objective import mean_loss
from jaxsteer.steering import init_steering
from jaxsteer.theory.predict import STREAM_SITES, aligned_start, gradient_factors, promise
from jaxsteer.types import Steering
from train.base_models import load
from train.cli import load_config_file
from train.config import TrainConfig
from train.display.console import progress
from train.display.plots import plot_by_layer
from train.run.training import Training, make_training
from train.theory.subjects import Pair, counter, write_result


def correlations(data: dict[str, Any]) -> dict[str, float]:
    """Spearman's, over the layers that were trained alone, of the fall that training found with each prediction."""
    block = {name: np.array(each)[data["layers"]] for name, each in data["promise"]["block"].items()}
    predictions = {
        "promise of rank 8": block["rank 8"],
        "energy": block["energy"],
        "share of the energy that rank 8 reaches": block["rank 8"] / block["energy"],
    }
    return {name: float(spearmanr(values, data["fall at one layer"]).statistic) for name, values in predictions.items()}


@dataclass(frozen=True)
class PredictStudy:
    """Which layers and sites should pay, by the gradients of a few batches at the base model; which do, by training
    steering at one layer alone and at one site alone; and whether D along the gradient's directions trains faster.
    Figures: promise.png, layers.png, starts.png.
    """

    config: str = "configs/theory.py"
    """A config file: its model, its task, and the rows of a training step."""
    plan: str = "nonlinear(rank=8) @ {site}"
    """The steering that is trained, at {site}."""
    lr: float = 5e-3
    """Its learning rate."""
    batches: int = 4
    """Training batches that the gradients are taken from."""
    batch_size: int = 8
    """Rows of one of them."""
    steps: int = 20
    """Steps of each training."""
    every: int = 5
    """Layers between those that are trained alone."""
    seeds: int = 1
    """Trainings from each start."""
    ridge: float = 1e-3
    """Of the fits, see `jaxsteer.theory.predict.promise`."""
    out: str = "runs/theory/predict"
    """Folder of the figures and of predict.json."""

    def run(self) -> None:
        """Predict, train, draw and write predict.json.

        Raises:
            ValueError: a config that is not there, or whose model does not fit the plan.
        """
        config = load_config_file(self.config, TrainConfig)
        loaded = load(config.model, "float32")
        base = Network(Model(loaded.config), loaded.base, {})
        pair = Pair(loaded, config, base, base)
        per_row = 8  # a row of this length holds at least so many examples
        batches = pair.batches(
            "train", self.batches * self.batch_size * per_row, rows=self.batch_size, length=config.sequence_length
        )
        held = pair.batches("validation", 4 * per_row * 2, rows=2, length=config.sequence_length)
        count = loaded.config.layers
        layers = sorted({*range(0, count, self.every), count - 1})
        runs = len(layers) + len(STREAM_SITES) + 2 * self.seeds
        data: dict[str, Any] = {"layers": layers, "steps": self.steps}
        with progress(len(batches) + runs * self.steps, "Predicting and training") as bar:
            tick = counter(bar.update)
            factors = gradient_factors(base, batches, advance=tick)
            promises = {site: promise(factors[site], self.ridge) for site in STREAM_SITES}
            data["promise"] = {
                site: {
                    "energy": np.asarray(p.energy).tolist(),
                    "fixed": np.asarray(p.fixed).tolist(),
                    **{f"rank {r}": np.asarray(p.ranks[:, r - 1]).tolist() for r in (1, 2, 4, 8, 16, 32)},
                }
                for site, p in promises.items()
            }

            def trained(where: str, seed: int = 0, start: Any = None) -> tuple[float, list[float]]:
                run = replace(
                    config,
                    plan=(self.plan.replace("{site}", where),),
                    optim=replace(config.optim, lr=self.lr),
                    steps=self.steps,
                    seed=seed,
                )
                training = make_training(run, loaded)
                if start is not None:
                    training = training.starting_from(start(training, seed))
                return self._train(run, training, held, tick)

            before = self._loss(base, {}, held)
            data["loss before"] = before
            data["fall at one layer"] = [before - trained(f"block layers={layer}")[0] for layer in layers]
            data["fall at one site"] = {site: before - trained(site)[0] for site in STREAM_SITES}

            def aligned(training: Training, seed: int) -> Steering:
                plan = training.model.plan
                fresh = init_steering(plan, loaded.config, jax.random.key(seed))
                return aligned_start(plan, fresh, factors, self.ridge)

            starts = {"drawn D": None, "aligned D": aligned}
            found = {
                name: [trained("block", seed, start) for seed in range(self.seeds)] for name, start in starts.items()
            }
        data["starts"] = {
            name: {"held-out loss": [f[0] for f in each], "training loss": [f[1] for f in each]}
            for name, each in found.items()
        }
        data["rank correlation over layers"] = correlations(data)
        self._draw(data, count, layers, np.sqrt(np.asarray(promises["block"].ranks[:, 7])))
        print(f"figures and numbers: {write_result(self.out, 'predict', data).parent}")

    def _train(self, config: TrainConfig, training: Training, held: list, tick: Any) -> tuple[float, list[float]]:
        state, losses = training.state, []
        for step in range(training.steps):
            state, metrics = training.step(state, training.batch(config, step), training.frozen)
            losses.append(float(metrics.loss))
            tick()
        params = training.params(state)
        return self._loss(Network(training.model, params.base, params.steering), params.steering, held), losses

    def _loss(self, network: Network, steering: Steering, held: list) -> float:
        loss = jax.jit(mean_loss, static_argnums=0)
        return float(np.mean([loss(network.model, network.base, steering, batch) for batch in held]))

    def _draw(self, data: dict[str, Any], count: int, layers: list[int], expected: np.ndarray) -> None:
        folder = Path(self.out)
        folder.mkdir(parents=True, exist_ok=True)
        share = lambda p: (np.array(p["rank 8"]) / np.array(p["energy"])).tolist()
        plot_by_layer(
            folder / "promise.png",
            {site: np.sqrt(p["rank 8"]).tolist() for site, p in data["promise"].items()},
            ylabel="first-order fall of the loss\nfor shifts of norm 1",
            title="What a linear map of rank 8 promises at each site",
        )
        measured = np.full(count, np.nan)
        measured[layers] = np.array(data["fall at one layer"]) / max(data["fall at one layer"])
        plot_by_layer(
            folder / "layers.png",
            {
                "promised, largest = 1": (expected / expected.max()).tolist(),
                f"after {self.steps} steps, largest = 1": measured.tolist(),
                "share of the gradient's energy": share(data["promise"]["block"]),
            },
            ylabel="fall of the loss",
            title="Post-block steering at one layer alone",
        )
        curves = {name: jnp.mean(jnp.array(each["training loss"]), axis=0) for name, each in data["starts"].items()}
        plot_by_layer(
            folder / "starts.png",
            {name: np.asarray(curve).tolist() for name, curve in curves.items()},
            xlabel="step",
            ylabel="training loss",
            title="Post-block steering from a drawn and from an aligned D",
        )
