"""What a run evaluates itself on: checked before weights are loaded, and what decides between its checkpoints."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any

from train.config import TrainConfig
from train.data import Example, Split
from train.display.console import say
from train.tasks import HeldOutTask
from train.tasks.protocols import TrainingTask
from train.tasks.scoring import Metric, is_checkable

Splits = Mapping[Split, list[Example]]


def task_of(config: TrainConfig) -> TrainingTask:
    """A run's task, with the validation examples that `validation_share` takes out of its training examples."""
    return HeldOutTask(config.task, config.validation_share) if config.validation_share else config.task


def read_splits(config: TrainConfig) -> dict[Split, list[Example]]:
    """The validation and test examples of a run, up to their limits."""
    limits: dict[Split, int] = {"validation": config.validation_examples, "test": config.test_examples}
    task = task_of(config)
    return {split: task.load(split)[:limit] if limit else [] for split, limit in limits.items()}


def decide(config: TrainConfig, splits: Splits, measured: Metric | None = None) -> TrainConfig:
    """The run with `select_by` decided, once its settings are known to have an effect.

    Args:
        config: the run.
        splits: its examples.
        measured: what the run measures besides accuracy and loss, which `auto` stands for then.

    Raises:
        ValueError: evaluations without validation examples; accuracy of examples without an answer; a figure that
            such a run does not measure.
    """
    validation, test = splits["validation"], splits["test"]
    if config.evaluate_every and not validation:
        raise ValueError(
            f"--evaluate-every {config.evaluate_every}: the task has no validation examples. Give it some "
            "(--task.validation FILE), hold out a share of the training examples (--validation-share 0.05), or leave "
            "out --evaluate-every"
        )
    if _is_set(config, "test_examples") and config.test_examples and not test:
        raise ValueError(
            f"--test-examples {config.test_examples}: the task has no test examples. Give it some (--task.test FILE), "
            "or leave out --test-examples"
        )
    known = ("accuracy", "validation_loss", *([measured] if measured else []))
    if config.select_by not in ("auto", *known):
        raise ValueError(f"--select-by {config.select_by}: jaxsteer {config.program} measures {', '.join(known)}")
    for text in _notes(config, splits):
        say(f"Note: {text}", stderr=False)
    if config.select_by == "accuracy" and (unanswered := [e for e in (*validation, *test) if e.gold is None]):
        raise ValueError(f"--select-by accuracy: {unanswered[0].source} has no answer; use --select-by validation_loss")
    if config.select_by != "auto":
        return config
    if measured is not None:
        return replace(config, select_by=measured)
    asked = validation if config.evaluate_every else test
    return replace(config, select_by="accuracy" if is_checkable(asked, config.task.rule) else "validation_loss")


def answers_tests(config: TrainConfig, splits: Splits) -> bool:
    """Whether the test questions of a run (after `decide`) are answered; else the loss of their completions tells."""
    return config.select_by == "accuracy" or is_checkable(splits["test"], config.task.rule)


def _notes(config: TrainConfig, splits: Splits) -> list[str]:
    """What a user may expect and will not get."""
    notes = []
    without = [name for name in ("validation_examples", "select_by") if _is_set(config, name)]
    if without and not config.evaluate_every and config.validation_examples:
        options = " and ".join("--" + name.replace("_", "-") for name in without)
        notes.append(f"{options}: without effect, because nothing is evaluated during training (--evaluate-every N)")
    elif splits["validation"] and not config.evaluate_every and config.validation_share:
        notes.append("the examples held out are not looked at during training without --evaluate-every N")
    asked = splits["validation"] if config.evaluate_every else splits["test"]
    if config.select_by == "auto" and asked and not is_checkable(asked, config.task.rule):
        notes.append(
            "the completions are free text, so answers are not marked right or wrong: the loss on them decides "
            "(--select-by accuracy generates and compares answers all the same)"
        )
    return notes


def _is_set(config: TrainConfig, name: str) -> bool:
    """Whether a setting is not at its default."""
    default: Any = next(field.default for field in fields(config) if field.name == name)
    return getattr(config, name) != default


def measured(config: TrainConfig) -> list[Split]:
    """The splits on which a run is evaluated."""
    limits: dict[Split, int] = {
        "validation": config.validation_examples if config.evaluate_every else 0,
        "test": config.test_examples,
    }
    return [split for split, limit in limits.items() if limit and task_of(config).recipe(split).parts]
