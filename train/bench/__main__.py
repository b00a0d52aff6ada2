"""Benchmarks: `python -m train.bench train --batch-size 8 --sequence-length 256`, or `decode`, `eval`, `load`,
`accelerator`.

Each prints a table and, with --json, writes the figures to a file. To compare two settings, interleave their runs on a
quiet machine.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

import tyro
from rich.console import Console
from rich.table import Table

from jaxsteer.io.files import write_json
from train.bench.accelerator.command import bench_accelerator
from train.bench.accelerator.settings import AcceleratorBench
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
    | Annotated[AcceleratorBench, tyro.conf.subcommand("accelerator")]
)


def main() -> None:
    """Run the benchmark that the command line asks for, and print its figures."""
    config = tyro.cli(Bench, prog="python -m train.bench", description=__doc__)
    enable_compilation_cache()
    if isinstance(config, AcceleratorBench):  # it saves each row itself
        bench_accelerator(config)
        return
    figures, table = _run(config)
    Console().print(table)
    if config.json:
        write_json(config.json, {"device": device_summary(), "settings": repr(config), **figures})


def _run(config: TrainBench | DecodeBench | EvalBench | LoadBench) -> tuple[Mapping[str, Any], Table]:
    """Figures by name and their table; for loading there is a column for each setting."""
    if isinstance(config, LoadBench):
        by_setting = bench_load(config)
        table = Table("", *by_setting)
        for name in next(iter(by_setting.values())):
            table.add_row(name, *(_text(figures[name]) for figures in by_setting.values()))
        return by_setting, table
    match config:
        case TrainBench():
            figures = bench_train(config)
        case DecodeBench():
            figures = bench_decode(config)
        case EvalBench():
            figures = bench_eval(config)
    table = Table(title=device_summary(), title_justify="left", show_header=False)
    for name, value in figures.items():
        table.add_row(name, _text(value))
    return figures, table


def _text(value: float) -> str:
    """Four significant digits, or all digits before the point."""
    return f"{value:,.4g}" if value < 100 else f"{value:,.0f}"


if __name__ == "__main__":
    run_main(main)
