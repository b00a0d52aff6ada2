"""Learning from a teacher: `python -m train.distill configs/distill_listops.py --teacher.shots 8`.

The teacher is the same model under another prompt (worked examples, a context, a system message), the same base with
other steering, or another model with the same tokenizer. The student learns its next-token distributions.
"""

from __future__ import annotations

from dataclasses import dataclass

from train.cli import Run, from_command_line, run_main
from train.config.distill import DistillConfig
from train.run.from_teacher import FromTeacher
from train.run.loop import run_training


@dataclass(frozen=True)
class DistillCommand:
    """Train steering, LoRA or a whole model to predict what a teacher predicts."""

    run: Run[DistillConfig]
    """The settings of the run."""
    dry_run: bool = False
    """Check everything, print plan, memory, steps and examples, and stop: nothing is trained, no weights are read, and
    nothing is written."""


def main() -> None:
    """Run a config and print what came out."""
    settings = from_command_line("distill", __doc__ or "", DistillCommand)
    run_training(settings.run, FromTeacher(), dry_run=settings.dry_run)


if __name__ == "__main__":
    run_main(main)
