"""Intervals, and paired comparison of two evaluations of the same examples."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import scipy.stats

from train.display.console import say
from train.evaluation.answers import Prompts, ScoredAnswer, read_answers

RESAMPLES = 10_000


@dataclass(frozen=True)
class Paired:
    """Difference in accuracy between two evaluations of the same examples.

    total                  number of examples
    difference             accuracy here minus accuracy there
    low, high              its 95 % percentile interval, bootstrapped over examples
    only_here, only_there  examples that only one of the two answers correctly
    p                      p-value of McNemar's exact test on those
    """

    total: int
    difference: float
    low: float
    high: float
    only_here: int
    only_there: int
    p: float

    def __str__(self) -> str:
        """E.g. "+3.2 points (95 %: +0.4 to +6.0; McNemar p = 0.03; right only here 40, only there 24)"."""
        points = f"{100 * self.difference:+.1f} points (95 %: {100 * self.low:+.1f} to {100 * self.high:+.1f}"
        return f"{points}; McNemar p = {self.p:.2g}; right only here {self.only_here}, only there {self.only_there})"


def compare_scores(here: Sequence[bool], there: Sequence[bool], seed: int = 0) -> Paired:
    """Compare two evaluations' scores of the same examples, in the same order.

    Raises:
        ValueError: no examples, or different numbers of scores.
    """
    if len(here) != len(there) or not len(here):
        raise ValueError(f"compare_scores: need two scores for each example, got {len(here)} and {len(there)}")
    differences = np.asarray(here, float) - np.asarray(there, float)
    gained, lost = int((differences > 0).sum()), int((differences < 0).sum())
    low = high = float(differences[0])
    if np.ptp(differences):
        # Resampling examples is drawing how many of each kind of difference there are.
        share = np.array([gained, lost, len(differences) - gained - lost]) / len(differences)
        drawn = np.random.default_rng(seed).multinomial(len(differences), share, RESAMPLES)
        low, high = np.percentile((drawn[:, 0] - drawn[:, 1]) / len(differences), (2.5, 97.5)).tolist()
    p = scipy.stats.binomtest(gained, gained + lost).pvalue if gained + lost else 1.0
    return Paired(len(differences), float(differences.mean()), low, high, gained, lost, float(p))


Key = tuple[str, str, str]
"""What identifies an example of an evaluation: its source, prompt and gold answer."""


def key_of(answer: ScoredAnswer) -> Key:
    """The example that an answer is for."""
    return answer.source, answer.prompt, str(answer.gold)


def keys_of(prompts: Prompts) -> list[Key]:
    """The examples that prompts are made of."""
    return [
        (prompt.source, text, str(prompt.answer)) for prompt, text in zip(prompts.tokens, prompts.texts, strict=True)
    ]


def check_same_examples(here: Sequence[Key], there: Sequence[Key]) -> None:
    """Check that two evaluations answer the same examples, in any order.

    Raises:
        ValueError: they do not.
    """
    if sorted(here) != sorted(there):
        raise ValueError(
            f"the two evaluations must answer the same examples: {len(here)} here, {len(there)} there, "
            f"{len({*here} & {*there})} in common (same source, prompt and gold answer); give both the same task, "
            "split, number and template"
        )


def compare_answers(here: Sequence[ScoredAnswer], there: Sequence[ScoredAnswer]) -> Paired:
    """Compare answers to the same prompts, in any order.

    Raises:
        ValueError: the two do not answer the same examples.
    """
    first, second = sorted(here, key=key_of), sorted(there, key=key_of)
    check_same_examples([*map(key_of, first)], [*map(key_of, second)])
    return compare_scores([answer.correct for answer in first], [answer.correct for answer in second])


def find_answers(path: str | Path, name: str = "steered", *, named: bool = False) -> list[ScoredAnswer]:
    """Read an answers file, or the one called `name` in a folder or its subfolder `evaluation`.

    Where a folder has no answers of that name, those of the whole steering are taken, or else the pretrained model's,
    and a line on stderr says so.

    Args:
        path: of the file or folder.
        name: of what was evaluated: "steered", "base" or a part's.
        named: take no other answers of a folder than those of that name.

    Raises:
        ValueError: there is none.
    """
    path = Path(path)
    names = [f"{name}.jsonl", "answers.jsonl", "steered.jsonl", "base.jsonl"]
    places = [folder / name for folder in (path, path / "evaluation") for name in dict.fromkeys(names)]
    file = path if path.is_file() else next((place for place in places if place.is_file()), None)
    if file is None:
        raise ValueError(f"{path}: no answers there; expected a .jsonl file of train.evaluate, or a folder with one")
    if file != path and file.stem not in (name, "answers"):
        if named:
            raise ValueError(
                f"{path}: has no {name}.jsonl to compare {name} with; evaluate the same --parts there, or give one "
                "file of answers, with which all are compared"
            )
        say(f"note: {path} has no {name}.jsonl; {name} is compared with {file}")
    try:
        return read_answers(file)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{file}: not answers of train.evaluate ({error})") from None


class Estimate(NamedTuple):
    """A mean with its 95 % interval."""

    mean: float
    low: float
    high: float


class Crossed(NamedTuple):
    """A mean over seeds and examples, with its standard error and Satterthwaite's degrees of freedom."""

    mean: float
    error: float
    freedom: float

    def interval(self) -> Estimate:
        """The mean with its 95 % interval."""
        half = float(scipy.stats.t.ppf(0.975, self.freedom)) * self.error
        return Estimate(self.mean, self.mean - half, self.mean + half)

    def p_above(self, value: float) -> float:
        """p-value of the one-sided test that the mean is above a value."""
        if not self.error:
            return 0.0 if self.mean > value else 1.0
        return float(scipy.stats.t.sf((self.mean - value) / self.error, self.freedom))

    def p_differs(self) -> float:
        """p-value of the two-sided test that the mean is not 0."""
        above = self.p_above(0.0)
        return min(1.0, 2 * min(above, 1 - above)) if self.error else float(self.mean == 0)

    def p_within(self, margin: float) -> float:
        """p-value of the equivalence test that the mean is between −margin and margin: two one-sided tests."""
        mirrored = self._replace(mean=-self.mean)
        return max(self.p_above(-margin), mirrored.p_above(-margin))

    def detectable(self, power: float = 0.8) -> float:
        """The smallest true mean that a two-sided test at 5 % finds with this probability, given the standard error."""
        quantiles = scipy.stats.t.ppf([0.975, power], self.freedom)
        return float(quantiles.sum()) * self.error


def crossed(scores: Sequence[Sequence[float]] | np.ndarray) -> Crossed:
    """Mean of scores [seeds, examples] with its error over new seeds and new examples.

    Two-way random effects without replication: Var(mean) = (MS_seeds + MS_examples - MS_rest) / (S n), at least the
    larger of its two parts alone, with Satterthwaite's degrees of freedom. One seed: over the examples only. Scores may
    be differences of two methods' scores on the same examples.

    Raises:
        ValueError: no seeds, fewer than 2 examples, or rows of different lengths.
    """
    if not len(scores) or len({len(row) for row in scores}) != 1 or len(scores[0]) < 2:
        raise ValueError("crossed: need scores [seeds, examples], at least 1 and 2, rows of one length")
    x = np.asarray(scores, float)
    seeds, n = x.shape
    mean = float(x.mean())
    examples_ms = seeds * float(x.mean(axis=0).var(ddof=1))
    if seeds == 1:
        return Crossed(mean, math.sqrt(examples_ms / n), n - 1.0)
    seeds_ms = n * float(x.mean(axis=1).var(ddof=1))
    rest = x - x.mean(axis=0, keepdims=True) - x.mean(axis=1, keepdims=True) + mean
    rest_df = (seeds - 1) * (n - 1)
    rest_ms = float((rest**2).sum()) / rest_df
    parts = [(seeds_ms, seeds - 1), (examples_ms, n - 1), (rest_ms, rest_df)]
    total = seeds_ms + examples_ms - rest_ms
    # The difference of estimates can fall below what one source alone gives: then that source is the estimate.
    larger = max(parts[:2])
    if total <= larger[0]:
        total, parts = larger[0], [larger]
    spread = sum(ms**2 / df for ms, df in parts)
    return Crossed(mean, math.sqrt(total / (seeds * n)), total**2 / spread if spread else 1.0)


def crossed_interval(scores: Sequence[Sequence[float]]) -> Estimate:
    """Mean of scores [seeds, examples] and its 95 % interval over new seeds and new examples, see `crossed`."""
    return crossed(scores).interval()


def holm(ps: Sequence[float]) -> list[float]:
    """p-values corrected for their number, so that any is below 5 % by chance in 5 % of cases at most (Holm 1979)."""
    adjusted, largest = [0.0] * len(ps), 0.0
    for rank, i in enumerate(sorted(range(len(ps)), key=lambda i: ps[i])):
        largest = max(largest, min(1.0, (len(ps) - rank) * ps[i]))
        adjusted[i] = largest
    return adjusted
