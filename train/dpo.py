"""Learning from preferences: `python -m train.dpo configs/dpo_listops.py --preference.beta 0.1`.

DPO, IPO, SimPO and BiPO on pairs of a chosen and a rejected answer; KTO on answers judged one by one. The reference is
the steering that training starts from, on the same base, so there is no second model.
"""

from __future__ import annotations

from dataclasses import dataclass

from train.cli import Run, from_command_line, run_main
from train.config.dpo import DpoConfig
from train.run.loop import run_training
from train.run.preferences import FromPreferences


@dataclass(frozen=True)
class DpoCommand:
    """Train steering, LoRA or a whole model on preferences: DPO, IPO, SimPO, BiPO or KTO."""

    run: Run[DpoConfig]
    """The settings of the run."""
    dry_run: bool = False
    """Check everything, print plan, memory, steps and examples, and stop: nothing is trained, no weights are read, and
    nothing is written."""


def main() -> None:
    """Run a config and print what came out."""
    settings = from_command_line("dpo", __doc__ or "", DpoCommand)
    run_training(settings.run, FromPreferences(), dry_run=settings.dry_run)


if __name__ == "__main__":
    run_main(main)
