"""The stage budgets: SmolLM2-135M-Instruct on ListOps, GSM8K and BoolQ at their full budgets, with several seeds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from train.bench.accelerator.records import LARGE, Context, Figures, Need, Row, Stage
from train.bench.accelerator.settings import AcceleratorBench
from train.cli import load_config_file
from train.compare.__main__ import compare
from train.compare.config import CompareConfig
from train.config import TrainConfig
from train.tasks import HubTask

ALL = 1_000_000
"""More test examples than any of the tasks has."""

MODEL = Need("the model, --model PATH", lambda device, config: config.model is not None)
CONFIGS = {"listops": None, "gsm8k": "gsm8k_smollm2", "boolq": "boolq_smollm2"}
"""Tasks and the configs that say how long they train; ListOps is compared as in compare_listops."""


def _data_of(task: str, config: AcceleratorBench) -> str | None:
    return {"gsm8k": config.gsm8k, "boolq": config.boolq}.get(task)


def _base(task: str, config: AcceleratorBench, listops: TrainConfig) -> TrainConfig:
    """What all runs on a task share."""
    name = CONFIGS[task]
    if name is None:
        base = listops
    else:
        run = load_config_file(name, TrainConfig)
        assert isinstance(run.task, HubTask)
        base = replace(run, task=replace(run.task, data=_data_of(task, config)), test_examples=ALL, eval_batch_size=256)
    assert config.model is not None
    base = replace(base, model=config.model)
    if not config.small:
        return base
    return replace(base, steps=1, batch_size=1, validation_examples=2, test_examples=2, eval_batch_size=2)


def comparison(task: str, config: AcceleratorBench) -> CompareConfig:
    """The comparison of the chosen methods on a task.

    Raises:
        ValueError: an unknown method.
    """
    listops = load_config_file("compare_listops", CompareConfig)
    return replace(
        listops,
        base=_base(task, config, listops.base),
        methods=config.methods,
        seeds=config.seeds,
        extensions=0 if config.small else listops.extensions,
        out=str(Path(config.runs) / task),
    )


def _measure(task: str, context: Context) -> Figures:
    """Train and answer, or go on with it: finished runs are kept in the comparison's folder."""
    results = compare(comparison(task, context.config))
    untouched = results["untouched"]
    figures: dict[str, Any] = {"seeds": results["seeds"], "untouched, %": 100 * untouched["mean"]}
    for row in results["methods"]:
        test = row["test"]
        figures[f"{row['method']}, %"] = 100 * test["mean"]
        figures[f"{row['method']}, 95 %"] = f"{100 * test['low']:.1f} to {100 * test['high']:.1f}"
    return figures


def rows(config: AcceleratorBench, records: Sequence[Any]) -> list[Row]:
    """One row for each task."""
    return [
        Row(
            task,
            partial(_measure, task),
            {
                "methods": list(config.methods),
                "seeds": config.seeds,
                "small": config.small,
                "model": config.model,
                "data": _data_of(task, config),
            },
            seconds=60.0,  # enough for it to be worth going on: one sweep
            needs=(LARGE, MODEL, *_needs(task)),
            resumes=True,
        )
        for task in CONFIGS
    ]


def _needs(task: str) -> tuple[Need, ...]:
    """The data, where the task does not make it itself."""
    if CONFIGS[task] is None:
        return ()
    return (Need(f"the data, --{task} PATH", lambda device, config: _data_of(task, config) is not None),)


STAGE = Stage(
    "budgets", "accuracy of SmolLM2 on ListOps, GSM8K and BoolQ at the full budgets; goes on where it stopped", rows
)
