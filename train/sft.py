"""Supervised fine-tuning: `python -m train.sft configs/listops_smollm2.py --optim.lr 3e-3`.

Evaluates the pretrained model, trains what the plan says, evaluates again, and leaves a folder with the config, the
metrics, checkpoints, a portable steering file, the answers before and after, a plot and a summary.
"""

from __future__ import annotations

from dataclasses import dataclass

from train.cli import Run, from_command_line, run_main
from train.config import TrainConfig
from train.run.loop import run_training


@dataclass(frozen=True)
class SftConfig:
    """Train steering, LoRA or a whole model on prompts and completions."""

    run: Run[TrainConfig]
    """The settings of the run."""
    dry_run: bool = False
    """Check everything, print plan, memory, steps and examples, and stop: nothing is trained, no weights are read, and
    nothing is written."""


def main() -> None:
    """Run a config and print what came out."""
    settings = from_command_line("sft", SftConfig.__doc__ or "", SftConfig)
    run_training(settings.run, dry_run=settings.dry_run)


if __name__ == "__main__":
    run_main(main)
