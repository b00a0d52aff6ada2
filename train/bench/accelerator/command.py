"""The command `python -m train.bench accelerator`: lists, tabulates or measures."""

from __future__ import annotations

from rich.console import Console

from jaxsteer.io.files import write_text
from train.bench.accelerator.records import Store
from train.bench.accelerator.runner import chosen, run
from train.bench.accelerator.settings import AcceleratorBench
from train.bench.accelerator.table import listed, markdown
from train.display.console import say


def bench_accelerator(config: AcceleratorBench) -> None:
    """Do what the settings ask for.

    Raises:
        ValueError: an unknown stage, or a file of results that is none.
    """
    chosen(config.stage)
    if config.list:
        Console().print(listed(config, Store(config.json)))
    elif config.table is not None:
        write_text(config.table, markdown(Store(config.json).records))
        say(f"tables: {config.table}", stderr=False)
    else:
        run(config)
