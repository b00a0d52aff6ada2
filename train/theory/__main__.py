"""What a fine-tuning does to activations, measured on a real model: `python -m train.theory orders`.

Each study prints a table and writes figures (PNG) and numbers (JSON) into its folder. The fine-tunings of
docs/theory.md take a minute or two each:

    python -m train.sft configs/theory.py
    python -m train.sft configs/theory.py --plan --train-base --optim.lr 1e-4 --out runs/theory/full
"""

from __future__ import annotations

from collections.abc import Callable

import tyro

from train.cli import run_main
from train.devices.machine import enable_compilation_cache
from train.theory.convert import ConvertStudy
from train.theory.geometry import GeometryStudy
from train.theory.oracle import OracleStudy
from train.theory.orders import OrdersStudy
from train.theory.predict import PredictStudy
from train.theory.study import Study
from train.theory.tangent import TangentStudy

STUDIES: dict[str, Callable[..., Study]] = {
    study.name: study for study in (OrdersStudy, TangentStudy, OracleStudy, ConvertStudy, GeometryStudy, PredictStudy)
}
"""Each study by its name."""


def main() -> None:
    """Run a study."""
    study = tyro.extras.subcommand_cli_from_dict(STUDIES, prog="python -m train.theory", description=__doc__)
    enable_compilation_cache()
    study.run()


if __name__ == "__main__":
    run_main(main)
