"""From a fine-tuned model to steering without labels, and back to weights: the study `convert`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from jaxsteer.io import save_steering
from jaxsteer.models.transformer import Network
from jaxsteer.theory.compare import Means
from jaxsteer.theory.conversion import FitSettings, Form, distill, to_lora, to_steering
from train.display.console import progress
from train.display.plots import plot_by_layer
from train.theory.subjects import counter, judge, read_pair, recovered, write_result


@dataclass(frozen=True)
class ConvertStudy:
    """Post-block steering made from a fine-tuned model and unlabelled prompts, by each form; what it loses in KL and
    accuracy; what distillation wins back; and the LoRA that the steering becomes. Figure: unexplained.png.
    """

    tuned: str = "runs/theory/lora/steering.safetensors"
    """The fine-tuning: a steering file, or a folder of a fully fine-tuned model."""
    config: str = "configs/theory.py"
    """The config file that it was trained with: names the base and the task."""
    forms: tuple[Form, ...] = ("fixed", "linear", "affine", "nonlinear")
    """Of steering: the mean shift, linear, linear with a vector, nonlinear."""
    rank: int = 8
    """Of the steering, and of the LoRA made from it."""
    ridge: float = 1e-5
    """Of the fits, as a share of the mean square of an input."""
    lora_ridge: float = 1e-2
    """The same for the LoRA, whose inputs have more dimensions."""
    prompts: int = 800
    """Training prompts to fit on; their answers are not looked at."""
    examples: int = 120
    """Test examples to measure on."""
    batch_size: int = 8
    """Rows of a batch."""
    sequence_length: int = 96
    """Tokens of a row."""
    distill_steps: int = 40
    """Steps of distillation, from the last form; 0 = none."""
    distill_rows: int = 2
    """Rows of a step of it."""
    distill_lr: float = 1e-4
    """Its learning rate: the share of itself that an entry moves by in a step."""
    lora: bool = True
    """Make a LoRA from the last form's steering."""
    out: str = "runs/theory/convert"
    """Folder of the figure, convert.json, and the steering of each form (*.safetensors)."""

    def run(self) -> None:
        """Convert, measure, draw, print a table and write convert.json.

        Raises:
            ValueError: there is no such fine-tuning, or settings that do not fit it.
        """
        pair = read_pair(self.tuned, self.config)
        fit_on = pair.batches("train", self.prompts, rows=self.batch_size, length=self.sequence_length, answers=False)
        test = pair.batches("test", self.examples, rows=self.batch_size, length=self.sequence_length)
        count, folder = pair.base.model.config.layers, Path(self.out)
        found: dict[str, Means] = {}
        left: dict[str, Any] = {}
        last = pair.base
        fits = len(self.forms) + self.lora
        total = fits * count + (2 + fits + bool(self.distill_steps)) + self.distill_steps
        with progress(total, "Converting") as bar:
            tick = counter(bar.update)

            def check(name: str, network: Network) -> None:
                found[name] = judge(pair.tuned, network, test)
                bar.note(f"{name}: KL {found[name].kl:.4f}, accuracy {found[name].accuracy:.3f}")
                tick()

            check("base", pair.base)
            check("fine-tuned", pair.tuned)
            for form in self.forms:
                settings = FitSettings(form, self.rank, ridge=self.ridge)
                made = to_steering(pair.tuned, pair.base, fit_on, settings, advance=tick)
                last, left[form] = made.network, np.asarray(made.unexplained).tolist()
                check(form, last)
                self._save(folder, form, pair, last)
            if self.lora:
                made = to_lora(last, pair.base, fit_on, self.rank, self.lora_ridge, advance=tick)
                left["LoRA from the steering"] = np.asarray(made.unexplained).tolist()
                check(f"LoRA from {self.forms[-1]}", made.network)
            if self.distill_steps:
                rows = pair.batches(
                    "train", self.prompts, rows=self.distill_rows, length=self.sequence_length, answers=False
                )
                done = distill(pair.tuned, last, rows, self.distill_steps, self.distill_lr, advance=tick)
                check(f"{self.forms[-1]}, distilled", done.network)
                bar.note(f"distillation: KL on the prompts {done.before:.4f} before, {done.after:.4f} after")
                self._save(folder, "distilled", pair, done.network)
        base, tuned = found["base"], found["fine-tuned"]
        data = {
            "prompts": self.prompts,
            "examples": self.examples,
            "rank": self.rank,
            "models": {name: {**m._asdict(), "recovered": recovered(m, base, tuned)} for name, m in found.items()},
            "unexplained": left,
        }
        path = write_result(folder, "convert", data)
        plot_by_layer(
            folder / "unexplained.png",
            left,
            ylabel="share of the shift left over",
            title=f"What fits of rank {self.rank} leave, on the steered stream",
        )
        table = Table(title="Conversions", title_justify="left")
        for column in ("model", "KL, nats", "same answer token", "accuracy", "gain recovered"):
            table.add_column(column)
        for name, m in found.items():
            shown = (f"{m.kl:.4f}", f"{m.agreement:.3f}", f"{m.accuracy:.3f}", f"{recovered(m, base, tuned):.2f}")
            table.add_row(name, *shown)
        Console().print(table)
        print(f"figure, numbers and steering files: {path.parent}")

    def _save(self, folder: Path, name: str, pair: Any, network: Network) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        config = pair.loaded.config
        save_steering(
            folder / f"{name}.safetensors",
            network.steering,
            network.model.plan,
            model_name=pair.config.model,
            config=config,
            notes={"converted_from": self.tuned},
        )
