"""Compare methods on one task with equal budgets: `python -m train.compare configs/compare_listops.py`.

For each method: learning rates on validation, further ones until the best is not at the grid's edge, then more seeds
at the best, reported on the test split. Finished runs are kept: a comparison that was stopped goes on where it was.
Leaves results.json, a table (results.md) and a plot (results.png) in its folder.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import tyro
from rich.console import Console

from jaxsteer.io import files
from jaxsteer.io.files import write_json
from train.cli import load_config_file, run_main
from train.compare.config import CompareConfig
from train.compare.report import write_report
from train.compare.runs import Comparison, search
from train.compare.timing import measure
from train.devices.machine import device_summary, enable_compilation_cache
from train.display.console import Bar, print_facts, progress
from train.run.folder import RunFolder, locked, open_run
from train.run.training import count_steps, load_base_model


def compare(config: CompareConfig) -> dict[str, Any]:
    """Carry out a comparison and return what results.json holds.

    Raises:
        ValueError: bad settings; a folder of another comparison.
    """
    enable_compilation_cache()
    with locked(config.out):
        run = open_run(config.out, config.to_json(), resume=Path(config.out, "config.json").exists())
        return _compare(config, run)


def _compare(config: CompareConfig, run: RunFolder) -> dict[str, Any]:
    loaded = load_base_model(config.base)
    console = Console()
    config = replace(config, base=replace(config.base, steps=count_steps(config.base, loaded)))
    base = config.base
    assert base.steps is not None
    planned = base.steps * (config.rates + config.seeds - 1)
    print_facts(
        {
            "device": device_summary(),
            "methods": ", ".join(entry.name for entry in config.entries),
            "budget": f"{base.steps} steps of {base.batch_size} rows of {base.sequence_length} tokens a run",
        }
    )
    results = []
    with progress(planned * len(config.entries), "Comparing", console=console) as bar:
        counter = _Counter(bar)
        comparison = Comparison(config, loaded, counter.add)
        for number, entry in enumerate(config.entries):
            best, tried = search(comparison, entry, bar.note)
            comparison.finish(entry, [(best, seed) for seed in range(config.seeds)])
            seeds = [comparison.tested(entry, best, seed) for seed in range(config.seeds)]
            results.append({"entry": entry, "best": best, "tried": tried, "seeds": seeds})
            counter.at_least((number + 1) * planned)
    timings = {}
    for entry in config.entries:
        path = comparison.folder / entry.slug / "timing.json"
        if not path.exists():
            console.print(f"Timing {entry.name}")
            write_json(path, measure(config.train_config(entry), loaded, config.rates))
        timings[entry.name] = files.read_json(path)
    return write_report(run.folder, config, results, timings, loaded, comparison.untouched())


class _Counter:
    """Run-steps done; runs that were finished earlier count as done when their entry is."""

    def __init__(self, bar: Bar) -> None:
        self._bar, self._done = bar, 0

    def add(self, done: int) -> None:
        self._done += done
        self._bar.update(self._done)

    def at_least(self, done: int) -> None:
        self._done = max(self._done, done)
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
        raise ValueError("nothing to compare: the first argument is a config file, e.g. configs/compare_listops.py")
    results = compare(config)
    Console().print((Path(config.out) / "results.md").read_text(), markup=False, highlight=False, soft_wrap=True)
    print(f"results: {', '.join(results['files'])}")


if __name__ == "__main__":
    run_main(main)
