"""Learning from rewards: `python -m train.grpo configs/grpo_listops.py --rewards exact 0.2*format`.

GRPO: answers are sampled from the present parameters, several to each prompt, and those that are rewarded above the
mean of their group become likelier. The choices of DAPO and Dr. GRPO are settings.
"""

from __future__ import annotations

from dataclasses import dataclass

from train.cli import Run, from_command_line, run_main
from train.config.grpo import GrpoConfig
from train.run.from_rewards import FromRewards
from train.run.loop import run_training


@dataclass(frozen=True)
class GrpoCommand:
    """Train steering, LoRA or a whole model on rewards of its own answers: GRPO."""

    run: Run[GrpoConfig]
    """The settings of the run."""
    dry_run: bool = False
    """Check everything, print plan, memory, steps and examples, and stop: nothing is trained, no weights are read, and
    nothing is written."""


def main() -> None:
    """Run a config and print what came out."""
    settings = from_command_line("grpo", __doc__ or "", GrpoCommand)
    run_training(settings.run, FromRewards(), dry_run=settings.dry_run)


if __name__ == "__main__":
    run_main(main)
