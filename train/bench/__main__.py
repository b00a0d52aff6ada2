"""Benchmarks: `python -m train.bench train --batch-size 8 --sequence-length 256`, `... decode`, `... eval`, `... load`.

Each prints a table and, with --json, writes the figures. Compare two settings by interleaved runs on a quiet machine.
"""

from __future__ import annotations

from typing import Annotated, Any

import tyro
from rich.console import Console
from rich.table import Table

from jaxsteer.io.files import write_json
from train.bench.decoding import DecodeBench, bench_decode
from train.bench.eval import EvalBench, bench_eval
from train.bench.load import LoadBench, bench_load
from train.bench.training import TrainBench, bench_train
from train.cli import run_main
from train.devices.machine import device_summary, enable_compilation_cache

Bench = (
    Annotated[TrainBench, tyro.conf.subcommand("train")]
    | Annotated[DecodeBench, tyro.conf.subcommand("decode")]
    | Annotated[EvalBench, tyro.conf.subcommand("eval")]
    | Annotated[LoadBench, tyro.conf.subcommand("load")]
)


def main() -> None:
    """Run a benchmark and print its figures."""
    config = tyro.cli(Bench, prog="python -m train.bench", description=__doc__)
    enable_compilation_cache()
    figures: dict[str, Any]
    if isinstance(config, LoadBench):
        figures = bench_load(config)
        table = Table("", *figures)
        for name in next(iter(figures.values())):
            table.add_row(name, *(_text(each[name]) for each in figures.values()))
    else:
        runs = {TrainBench: bench_train, DecodeBench: bench_decode, EvalBench: bench_eval}
        figures = runs[type(config)](config)  # type: ignore[operator]
        table = Table(title=device_summary(), title_justify="left", show_header=False)
        for name, value in figures.items():
            table.add_row(name, _text(value))
    Console().print(table)
    if config.json:
        write_json(config.json, {"device": device_summary(), "settings": repr(config), **figures})


def _text(value: float) -> str:
    return f"{value:,.4g}" if value < 100 else f"{value:,.0f}"


if __name__ == "__main__":
    run_main(main)
