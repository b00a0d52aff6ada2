"""Compare methods on one task with equal budgets: `python -m train.compare configs/compare_listops.py`.

For each method, search a grid of learning rates on the validation split, extend the grid while the best rate is at its
edge, train further seeds at the best rate, and report accuracy on the test split. Finished runs are kept: start an
interrupted comparison again and it continues. After each method, results.json, a table (results.md) and a plot
(results.png) are written anew; what a step of each costs is timed last, when nothing else runs.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import tyro
from rich.console import Console

from jaxsteer.io import LoadedModel
from jaxsteer.io.files import read_json, write_json
from train.base_models import describe
from train.cli import load_config_file, print_settings, run_main
from train.compare.check import check_comparison
from train.compare.config import CompareConfig, Entry
from train.compare.records import MethodResult, Results, Timing, read_record
from train.compare.report import write_report
from train.compare.runs import Comparison
from train.compare.timing import measure
from train.compare.workers import cores_of_workers, working
from train.devices.machine import device_summary, enable_compilation_cache
from train.devices.placement import SINGLE
from train.display.console import Bar, print_facts, progress
from train.run.folder import RunFolder, check_run, locked, note_model, open_run, starting
from train.run.start import filled
from train.run.training import encoding_of, load_base_model, make_training


def compare(config: CompareConfig) -> Results:
    """Run a comparison, or continue it, and return what results.json holds.

    Raises:
        ValueError: no methods, settings that cannot be compared, or a folder that holds another comparison, or one on
            other data.
    """
    if not config.entries:
        raise ValueError("nothing to compare: give a config file first, e.g. configs/compare_listops.py")
    if config.workers > 1:
        cores_of_workers(config.workers)
    enable_compilation_cache()
    run = RunFolder(Path(config.out))
    with locked(config.out), starting(run):
        resume = run.config.exists()
        config = replace(config, base=filled(config.base, _stored_base(run) if resume else None))
        base = config.base
        model = describe(base.model, base.dtype, quantised=base.quantise == "int8", tokenizer=base.tokenizer)
        config = _completed(config, model)
        check_run(config.out, config.to_json(), resume=resume)
        inputs, steps = check_comparison(config, model)
        open_run(config.out, config.to_json(), resume=resume, inputs=inputs)
        loaded = load_base_model(config.base)
        if loaded.sample is not None:
            note_model(run, loaded.sample.digest)
        return _compare(replace(config, base=replace(config.base, steps=steps)), run, loaded)


def _stored_base(run: RunFolder) -> dict[str, Any]:
    """The settings that all runs of the comparison in a folder have in common.

    Raises:
        ValueError: the folder holds something else.
    """
    base = read_json(run.config).get("base")
    if not isinstance(base, dict):
        raise ValueError(f"{run.config}: not the settings of a comparison (it has no base); use another --out")
    return base


def _completed(config: CompareConfig, model: LoadedModel) -> CompareConfig:
    """The settings with the day filled in that a chat template writes into the prompts."""
    encoding = encoding_of(config.base).dated(model.require_tokenizer())
    return replace(config, base=replace(config.base, date=encoding.date))


def _compare(config: CompareConfig, run: RunFolder, loaded: LoadedModel) -> Results:
    base = config.base
    print_facts(
        {
            "device": device_summary(),
            "methods": "; ".join(entry.name for entry in config.chosen),
            "budget": f"{config.steps} steps per run, {base.batch_size} rows of {base.sequence_length} tokens per step",
        }
    )
    results: list[MethodResult] = []
    with progress(config.planned_steps * len(config.chosen), "Comparing") as bar:
        counter = _Counter(bar, config)
        comparison = Comparison(config, loaded, counter.add)
        with working(config, counter.add) as until_finished:
            untouched = comparison.untouched()
            for number, entry in enumerate(config.chosen, 1):
                if (hours := counter.hours_left()) is not None:
                    bar.note(f"{entry.name}: {number} of {len(config.chosen)}, about {hours:.1f} hours left")
                until_finished(entry)
                runs = comparison.runs_of(entry, bar.note)
                results.append(MethodResult(entry, *runs, _timing(comparison, entry, measuring=False)))
                report = write_report(run.folder, config, results, loaded, untouched)
                counter.finish(config.steps * results[-1].runs)
    if config.timings and any(result.timing is None for result in results):
        timed = [replace(result, timing=_timing(comparison, result.entry, measuring=True)) for result in results]
        report = write_report(run.folder, config, timed, loaded, untouched)
    return report


def _timing(comparison: Comparison, entry: Entry, *, measuring: bool) -> Timing | None:
    """A method's timing from its file; if there is none, it is measured now or None."""
    config, path = comparison.config, comparison.folder / entry.slug / "timing.json"
    if not path.exists():
        if not measuring:
            return None
        Console().print(f"Timing {entry.name}")
        training = make_training(replace(config.train_config(entry), mesh=SINGLE), comparison.loaded)
        write_json(path, measure([training] * config.merged(entry, config.timed_runs)))
    return read_record(path, Timing)


class _Counter:
    """Training steps over all runs: how many are done, and an estimate of how many there will be, as grids may grow.

    Runs that were made before are counted when their method has finished.
    """

    def __init__(self, bar: Bar, config: CompareConfig) -> None:
        self._bar, self._run = bar, config.steps
        self._planned, self._methods = config.planned_steps, len(config.chosen)
        self._finished = self._done = self._taken = 0
        self._began: float | None = None

    @property
    def _total(self) -> int:
        """The steps of finished methods and those planned for the others; at least those of the runs begun."""
        return max(self._finished + self._methods * self._planned, -(-self._done // self._run) * self._run)

    def add(self, steps: int) -> None:
        """Steps have been done."""
        self._done += steps
        if self._began is None:  # what comes before the first step, such as compilation, comes once
            self._began = time.monotonic()
        else:
            self._taken += steps
        self._show(self._bar.update)

    def finish(self, steps: int) -> None:
        """A method has finished, after that many steps over all its runs."""
        self._methods -= 1
        self._finished += steps
        made_before = self._finished > self._done
        self._done = max(self._done, self._finished)
        self._show(self._bar.skip if made_before else self._bar.update)

    def hours_left(self) -> float | None:
        """Estimated hours until all steps are done, evaluation included; None before the second step."""
        if self._began is None or not self._taken:
            return None
        return (self._total - self._done) * (time.monotonic() - self._began) / self._taken / 3600

    def _show(self, move: Callable[[int], None]) -> None:
        self._bar.expect(self._total)
        move(self._done)


def main() -> None:
    """Run a comparison and print its table."""
    argv, default = sys.argv[1:], CompareConfig()
    if print_only := "--print-config" in argv:
        argv.remove("--print-config")
    if argv and not argv[0].startswith("-"):
        default, argv = load_config_file(argv[0], CompareConfig), argv[1:]
    config = tyro.cli(
        tyro.conf.AvoidSubcommands[CompareConfig],
        prog="python -m train.compare CONFIG",
        description=__doc__,
        args=argv,
        default=default,
    )
    if print_only:
        print_settings(config)
    results = compare(config)
    Console().print(
        (Path(config.out) / "results.md").read_text(encoding="utf-8"), markup=False, highlight=False, soft_wrap=True
    )
    print(f"results: {', '.join(results['files'])}")


if __name__ == "__main__":
    run_main(main)
