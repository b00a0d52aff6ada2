"""What a fine-tuning does to activations, measured on a real model: `python -m train.theory orders`.

Each study writes figures (PNG) and what they show (JSON) into its folder. Those of docs/theory.md measure two
fine-tunings, which take a minute or two each:

    python -m train.sft configs/theory.py
    python -m train.sft configs/theory.py --plan --train-base --optim.lr 1e-4 --out runs/theory/full
"""

from __future__ import annotations

from typing import Any

import tyro

from train.cli import run_main
from train.devices.machine import enable_compilation_cache
from train.theory.convert import ConvertStudy
from train.theory.geometry import GeometryStudy
from train.theory.oracle import OracleStudy
from train.theory.orders import Orders
from train.theory.predict import PredictStudy
from train.theory.tangent import Tangent

STUDIES: dict[str, Any] = {
    "orders": Orders,
    "tangent": Tangent,
    "oracle": OracleStudy,
    "convert": ConvertStudy,
    "geometry": GeometryStudy,
    "predict": PredictStudy,
}
"""A study by its name: a frozen dataclass of settings whose `run()` carries it out."""


def main() -> None:
    """Run a study."""
    study = tyro.extras.subcommand_cli_from_dict(STUDIES, prog="python -m train.theory", description=__doc__)
    enable_compilation_cache()
    study.run()


if __name__ == "__main__":
    run_main(main)
