"""Rewards of generated answers: those of the tasks by name, and functions of one's own."""

from __future__ import annotations

import importlib
import importlib.util
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from jaxsteer.plans import did_you_mean
from train.data import Example
from train.data.fields import show
from train.tasks.scoring import Rule, extract, score

Reward = Callable[[Example, str], float]
"""(example, generated answer) -> reward, any finite number."""


@dataclass(frozen=True)
class WeightedReward:
    """A reward as a setting names it, and its factor in the sum."""

    name: str
    weight: float
    function: Reward

    def of(self, example: Example, answer: str) -> float:
        """The reward of an answer, without the factor.

        Raises:
            ValueError: naming the example: the function raises an error, or gives something else than a finite number.
        """
        where = f"reward {self.name}: {example.source}, answer {show(answer)}"
        return finite_number(lambda: self.function(example, answer), where)


def finite_number(function: Callable[[], Any], where: str) -> float:
    """What a user's function gives.

    Args:
        function: to call.
        where: which function, and of what, for error messages.

    Raises:
        ValueError: beginning with `where`: it raises an error, or gives something else than a finite number.
    """
    try:
        value = function()
    except Exception as error:  # the function is a user's
        raise ValueError(f"{where}: {type(error).__name__}: {error}") from error
    try:
        number = float(value) if not isinstance(value, str) else None
    except (TypeError, ValueError, OverflowError):
        number = None
    if number is None:
        raise ValueError(f"{where}: gave {repr(value)[:60]}, need a number")
    if not math.isfinite(number):
        raise ValueError(f"{where}: gave {number}, need a finite number")
    return number


def _matches(example: Example, answer: str, rule: Rule) -> float:
    if example.gold is None:
        raise ValueError("the example has no right answer")
    return float(score(answer, example.gold, rule))


def _is_readable(example: Example, answer: str, rule: Rule) -> float:
    return float(extract(answer, rule) is not None)


def parse_rewards(texts: Sequence[str], rule: Rule) -> tuple[WeightedReward, ...]:
    """Rewards from their names, "0.2*format" or "rewards.py:concise".

    exact  whether the task's rule finds the right answer; number, label: the same by these rules
    format  whether the task's rule finds any answer

    Args:
        texts: the names: one of these, FILE.py:FUNCTION or MODULE:FUNCTION, each perhaps with a factor before it.
        rule: the task's.

    Raises:
        ValueError: an unknown name, a factor that is no number, a function that cannot be imported, or none.
    """
    if not texts:
        raise ValueError("--rewards: give at least one")
    return tuple(_parse(text, rule) for text in texts)


def _parse(text: str, rule: Rule) -> WeightedReward:
    factor, times, name = text.rpartition("*")
    try:
        weight = float(factor) if times else 1.0
    except ValueError:
        raise ValueError(f"--rewards {text}: {factor!r} is not a number") from None
    if not math.isfinite(weight):
        raise ValueError(f"--rewards {text}: the factor must be finite")
    named: dict[str, Reward] = {
        "exact": partial(_matches, rule=rule),
        "number": partial(_matches, rule="number"),
        "label": partial(_matches, rule="label"),
        "format": partial(_is_readable, rule=rule),
    }
    if name in named:
        return WeightedReward(name, weight, named[name])
    if ":" not in name:
        hint = did_you_mean(name, named)
        raise ValueError(f"--rewards {text}: no such reward{hint}; use {', '.join(named)}, or FILE.py:FUNCTION")
    return WeightedReward(name, weight, imported(name, "--rewards"))


def imported(name: str, option: str) -> Callable[..., Any]:
    """The function that FILE.py:FUNCTION or MODULE:FUNCTION names.

    Args:
        name: as typed.
        option: how the user named it, for error messages.

    Raises:
        ValueError: it cannot be imported.
    """
    where, _, function = name.rpartition(":")
    if where.endswith(".py") and not Path(where).is_file():
        raise ValueError(f"{option} {name}: no such file {where}")
    try:
        module = _module_of(where)
    except Exception as error:  # whatever the file does when it is imported
        raise ValueError(f"{option} {name}: {where} cannot be imported ({type(error).__name__}: {error})") from None
    found = getattr(module, function, None)
    if not callable(found):
        raise ValueError(f"{option} {name}: {where} has no function {function!r}")
    return found


def code_files(names: Sequence[str]) -> list[str]:
    """The files of those names that are FILE.py:FUNCTION."""
    places = (name.rpartition(":")[0] for name in names)
    return list(dict.fromkeys(place for place in places if place.endswith(".py")))


def _module_of(where: str) -> Any:
    if not where.endswith(".py"):
        return importlib.import_module(where)
    spec = importlib.util.spec_from_file_location(f"rewards_{Path(where).stem}", where)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look themselves up there
    spec.loader.exec_module(module)
    return module


def check_rewards(rewards: Sequence[WeightedReward], examples: Sequence[Example]) -> None:
    """Ask each reward for the right answer of the first example, so that a mistake shows before anything is trained.

    Raises:
        ValueError: as `WeightedReward.of`.
    """
    for example in examples[:1]:
        for reward in rewards:
            reward.of(example, example.gold or "")
