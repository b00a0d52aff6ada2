"""Benchmarks: `jaxsteer bench train --batch-size 8 --sequence-length 256`, `data`, `decode`, `eval`, `load` or `serve`.

Each prints a table and, with --json, writes the figures to a file. To compare two settings, interleave their runs on a
quiet machine. `against` measures other programs beside jaxsteer, and `accelerator` all that needs one; both save each
row when it is measured and go on where they stopped.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Annotated, Any

import tyro
from rich.console import Console
from rich.table import Table

from jaxsteer.io.files import write_json
from train.bench.accelerator.command import bench_accelerator
from train.bench.accelerator.settings import AcceleratorBench
from train.bench.against.arena import AgainstBench
from train.bench.against.command import bench_against
from train.bench.data import DataBench, bench_data
from train.bench.decoding import DecodeBench, bench_decode
from train.bench.eval import EvalBench, bench_eval
from train.bench.figures import shown
from train.bench.load import LoadBench, bench_load
from train.bench.serve import ServeBench, bench_serve
from train.bench.training import TrainBench, bench_train
from train.cli import run_main
from train.devices.machine import device_summary, enable_compilation_cache

Bench = (
    Annotated[TrainBench, tyro.conf.subcommand("train")]
    | Annotated[DataBench, tyro.conf.subcommand("data")]
    | Annotated[DecodeBench, tyro.conf.subcommand("decode")]
    | Annotated[EvalBench, tyro.conf.subcommand("eval")]
    | Annotated[LoadBench, tyro.conf.subcommand("load")]
    | Annotated[ServeBench, tyro.conf.subcommand("serve")]
    | Annotated[AgainstBench, tyro.conf.subcommand("against")]
    | Annotated[AcceleratorBench, tyro.conf.subcommand("accelerator")]
)

BY_ROW: dict[type, Callable[[Any], None]] = {AgainstBench: bench_against, AcceleratorBench: bench_accelerator}
"""Benchmarks that save and show their rows themselves."""

FIGURES: dict[type, Callable[[Any], Mapping[str, Any]]] = {
    TrainBench: bench_train,
    DataBench: bench_data,
    DecodeBench: bench_decode,
    EvalBench: bench_eval,
    LoadBench: bench_load,
    ServeBench: bench_serve,
}
"""Benchmarks that give figures by name, or by setting and name."""


def main() -> None:
    """Run the benchmark that the command line asks for, and print its figures."""
    config = tyro.cli(Bench, prog="jaxsteer bench", description=__doc__)
    enable_compilation_cache()
    if type(config) in BY_ROW:
        BY_ROW[type(config)](config)
        return
    figures = FIGURES[type(config)](config)
    Console().print(_table(figures))
    if config.json:
        write_json(config.json, {"device": device_summary(), "settings": repr(config), **figures})


def _table(figures: Mapping[str, Any]) -> Table:
    """One row for each figure, and a column for each setting if there are several."""
    if isinstance(next(iter(figures.values())), Mapping):
        table = Table("", *figures)
        for name in next(iter(figures.values())):
            table.add_row(name, *(shown(of_setting[name]) for of_setting in figures.values()))
        return table
    table = Table(title=device_summary(), title_justify="left", show_header=False)
    for name, value in figures.items():
        table.add_row(name, shown(value))
    return table


if __name__ == "__main__":
    run_main(main)
