"""Compare methods on one task with equal budgets: `python -m train.compare configs/compare_listops.py`.

For each method, search a grid of learning rates on the validation split, extend the grid while the best rate is at its
edge, train further seeds at the best rate, and report accuracy on the test split. Finished runs are kept: start an
interrupted comparison again and it continues. Writes results.json, a table (results.md) and a plot (results.png).
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import cast

import tyro
from rich.console import Console

from jaxsteer.io.files import read_json, write_json
from train.cli import load_config_file, run_main
from train.compare.config import CompareConfig, Entry
from train.compare.records import MethodResult, Results, RunRecord, Timing
from train.compare.report import write_report
from train.compare.runs import Comparison, search
from train.compare.timing import measure
from train.devices.machine import device_summary, enable_compilation_cache
from train.display.console import Bar, print_facts, progress
from train.run.folder import RunFolder, locked, open_run
from train.run.training import count_steps, load_base_model


def compare(config: CompareConfig) -> Results:
    """Run a comparison, or continue it, and return what results.json holds.

    Raises:
        ValueError: settings that cannot be compared, or a folder that holds another comparison.
    """
    enable_compilation_cache()
    with locked(config.out):
        run = open_run(config.out, config.to_json(), resume=Path(config.out, "config.json").exists())
        return _compare(config, run)


def _compare(config: CompareConfig, run: RunFolder) -> Results:
    loaded = load_base_model(config.base)
    base = replace(config.base, steps=count_steps(config.base, loaded))
    config = replace(config, base=base)
    print_facts(
        {
            "device": device_summary(),
            "methods": ", ".join(entry.name for entry in config.entries),
            "budget": f"{config.steps} steps per run, {base.batch_size} rows of {base.sequence_length} tokens per step",
        }
    )
    planned = config.steps * (config.rates + config.seeds - 1)
    runs: list[tuple[int, list[RunRecord], list[RunRecord]]] = []
    with progress(planned * len(config.entries), "Comparing") as bar:
        counter = _Counter(bar)
        comparison = Comparison(config, loaded, counter.add)
        for number, entry in enumerate(config.entries, 1):
            best, tried = search(comparison, entry, bar.note)
            comparison.finish(entry, [(best, seed) for seed in range(config.seeds)])
            runs.append((best, tried, [comparison.tested(entry, best, seed) for seed in range(config.seeds)]))
            counter.at_least(number * planned)
    results = [
        MethodResult(entry, best, tried, seeds, _timing(comparison, entry))
        for entry, (best, tried, seeds) in zip(config.entries, runs, strict=True)
    ]
    return write_report(run.folder, config, results, loaded, comparison.untouched())


def _timing(comparison: Comparison, entry: Entry) -> Timing:
    """A method's timing, from its file or measured now."""
    config, path = comparison.config, comparison.folder / entry.slug / "timing.json"
    if not path.exists():
        Console().print(f"Timing {entry.name}")
        write_json(path, measure(config.train_config(entry), comparison.loaded, config.rates))
    return cast(Timing, read_json(path))


class _Counter:
    """Training steps done, over all runs; runs finished earlier are counted when their method is."""

    def __init__(self, bar: Bar) -> None:
        self._bar, self._done = bar, 0

    def add(self, steps: int) -> None:
        self._done += steps
        self._bar.update(self._done)

    def at_least(self, steps: int) -> None:
        self._done = max(self._done, steps)
        self._bar.update(self._done)


def main() -> None:
    """Run a comparison and print its table."""
    argv, default = sys.argv[1:], CompareConfig()
    if argv and not argv[0].startswith("-"):
        default, argv = load_config_file(argv[0], CompareConfig), argv[1:]
    config = tyro.cli(
        tyro.conf.AvoidSubcommands[CompareConfig],
        prog="python -m train.compare CONFIG",
        description=__doc__,
        args=argv,
        default=default,
    )
    if not config.entries:
        raise ValueError("nothing to compare: give a config file first, e.g. configs/compare_listops.py")
    results = compare(config)
    Console().print((Path(config.out) / "results.md").read_text(), markup=False, highlight=False, soft_wrap=True)
    print(f"results: {', '.join(results['files'])}")


if __name__ == "__main__":
    run_main(main)
