"""From a fine-tuned model to steering without labels, and back to weights: the study `convert`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from jaxsteer.io import derived_notes, load_steering, save_steering
from jaxsteer.io.files import Json
from jaxsteer.models.transformer import Network
from jaxsteer.ranges import Count, Natural, NonNegative, Positive
from jaxsteer.theory import FitSettings, Means, distill, to_lora, to_steering
from jaxsteer.theory.conversion import Form
from jaxsteer.types import Batch
from train.display.plots import plot_by_layer
from train.theory.study import Data, PairStudy, Row, Ticker, ticking
from train.theory.subjects import Base, comparison_rows, count_examples, in_run, judge, with_recovered

Check = Callable[[str, Network], None]
"""Compares a named network with the fine-tuned one."""


@dataclass(frozen=True, kw_only=True)
class ConvertStudy(PairStudy):
    """Post-block steering made from a fine-tuned model and unlabelled prompts, in several forms: the KL and accuracy
    that it loses, what distillation wins back, and the LoRA that the steering becomes. Figure: unexplained.png.
    """

    name = "convert"
    title = "Conversions"
    splits = ("test", "train")

    forms: tuple[Form, ...] = ("fixed", "linear", "affine", "nonlinear")
    """Forms of steering to fit: mean shift, linear, linear with a vector, nonlinear."""
    rank: Count = 8
    """Rank of the steering, and of the LoRA made from it."""
    ridge: NonNegative = 1e-5
    """Ridge penalty of the steering fits, as a share of the mean square of an input."""
    lora_ridge: NonNegative = 1e-2
    """Ridge penalty of the LoRA fits, whose inputs have more dimensions."""
    prompts: Count = 800
    """Number of training prompts to fit on; their answers are not used."""
    distill_steps: Natural = 40
    """Steps of distillation, starting from the last form; 0 = no distillation."""
    distill_rows: Count = 2
    """Rows per batch of distillation."""
    distill_lr: Positive = 1e-4
    """Learning rate of distillation: the share of itself by which an entry moves in a step."""
    lora: bool = True
    """Also make a LoRA from the last form's steering."""
    out: str = "runs/theory/convert"
    """Output folder for the figure, convert.json and the steering of each form (*.safetensors)."""

    def measure(self) -> Data:
        """Convert, compare each result with the fine-tuned model, and save the steering files."""
        base, tuned = self.read()
        prompts, test = self._prompts(base, self.batch_size), self.test_batches(base)
        results: dict[str, Means] = {}
        unexplained: dict[str, list[float]] = {}
        fits = len(self.forms) + self.lora
        checks = 2 + fits + bool(self.distill_steps)
        with ticking(fits * base.loaded.config.layers + checks + self.distill_steps, "Converting") as tick:

            def check(name: str, network: Network) -> None:
                results[name] = judge(tuned, network, test)
                tick.note(f"{name}: KL {results[name].kl:.4f}, accuracy {results[name].accuracy:.3f}")
                tick()

            check("base", base.network)
            check("fine-tuned", tuned)
            steered = base.network
            for form in self.forms:
                settings = FitSettings(form, self.rank, ridge=self.ridge)
                converted = to_steering(tuned, base.network, prompts, settings, advance=tick)
                steered, unexplained[form] = converted.network, np.asarray(converted.unexplained).tolist()
                check(form, steered)
                self._save(form, base, steered, by="to_steering", form=form, rank=self.rank, prompts=self.prompts)
            if self.lora:
                converted = to_lora(steered, base.network, prompts, self.rank, self.lora_ridge, advance=tick)
                unexplained["LoRA from the steering"] = np.asarray(converted.unexplained).tolist()
                check(f"LoRA from {self.forms[-1]}", converted.network)
            if self.distill_steps:
                self._distill(base, tuned, steered, check, tick)
        return {
            "prompts": count_examples(prompts),
            "examples": count_examples(test),
            "rank": self.rank,
            "models": with_recovered(results),
            "unexplained": unexplained,
        }

    def draw(self, data: Data, folder: Path) -> None:
        """What each fit leaves of the shift, by layer."""
        plot_by_layer(
            folder / "unexplained.png",
            data["unexplained"],
            ylabel="share of the shift left over",
            title=f"What fits of rank {data['rank']} leave, on the steered stream",
        )

    def rows(self, data: Data) -> Sequence[Row]:
        """A row per model."""
        return comparison_rows(data["models"], "model")

    def _prompts(self, base: Base, batch_size: int) -> list[Batch]:
        return base.batches(
            "train", self.prompts, batch_size=batch_size, sequence_length=self.sequence_length, answers=False
        )

    def _distill(self, base: Base, tuned: Network, steered: Network, check: Check, tick: Ticker) -> None:
        """Distil the last form's steering on the prompts, check it and save it."""
        prompts = self._prompts(base, self.distill_rows)
        distilled = distill(tuned, steered, prompts, self.distill_steps, self.distill_lr, advance=tick)
        check(f"{self.forms[-1]}, distilled", distilled.network)
        tick.note(f"distillation: KL on the prompts {distilled.before:.4f} before, {distilled.after:.4f} after")
        steps, rate = self.distill_steps, self.distill_lr
        self._save("distilled", base, distilled.network, by="distill", form=self.forms[-1], steps=steps, lr=rate)

    def _save(self, name: str, base: Base, network: Network, *, by: str, **facts: Json) -> None:
        """Write the steering, with notes on what it was made from and how."""
        path = Path(self.out) / f"{name}.safetensors"
        tuned = in_run(self.tuned)
        origin = None if tuned.is_dir() else load_steering(tuned)
        path.parent.mkdir(parents=True, exist_ok=True)
        save_steering(
            path,
            network.steering,
            network.model.plan,
            model_name=base.config.model,
            config=base.loaded.config,
            notes=derived_notes(by, origin, **facts, tuned=self.tuned, data=base.config_file),
            sample=base.loaded.sample,
        )
