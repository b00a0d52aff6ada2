"""Exact match: the answer in a generated text, whether it is right, and how sure the accuracy is."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, get_args

from train.tasks import extract as answers

Rule = Literal["exact", "digit", "tagged", "number", "label", "last_label", "truth", "relation"]
"""exact       the whole text, without the white space around it
digit       the first digit anywhere in the text: the reading most generous to a model that was never taught the format
tagged      the inside of the first <answer>...</answer>
number      in the last \\boxed{...}, else after the last "answer:" (or ####), else the last number in the text
label       of a choice: the first "Answer: (B) ...", "Answer: Option1" or "the answer is answer3", else the label that
            the text begins with, else the only one in brackets
last_label  the same, but the last "Answer: ...": for an answer that follows its reasoning
truth       true or false: the first after "answer:", else the first in the text
relation    entailment, neutral or contradiction, likewise
"""


def extract(output: str, rule: Rule = "exact") -> str | None:
    """The answer in a generated text (stop tokens already removed); None where the rule finds none.

    Raises:
        ValueError: for an unknown rule.
    """
    if rule not in get_args(Rule):
        raise ValueError(f"scoring rule: got {rule!r}, need one of {get_args(Rule)}")
    return answers.READERS[rule](output)


def score(output: str, gold: str, rule: Rule = "exact") -> bool:
    """Whether the answer in a generated text is the gold answer: the same text or label, or equal numbers."""
    answer = extract(output, rule)
    return answer is not None and answers.same(answer, gold, rule)


def interval(successes: int, n: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a proportion: (p + z²/2n ± z √(p(1-p)/n + z²/4n²)) / (1 + z²/n).

    Wilson 1927, doi:10.1080/01621459.1927.10502953. Unlike p ± z √(p(1-p)/n) it holds near 0 and 1.

    Returns:
        Lower and upper end, in [0, 1].

    Raises:
        ValueError: unless 0 <= successes <= n and n > 0.
    """
    if not 0 <= successes <= n or n == 0:
        raise ValueError(f"interval: got {successes} successes of {n}, need 0 <= successes <= n and n > 0")
    z = 1.959963984540054  # the 97.5 % point of the normal distribution
    p = successes / n
    centre = p + z * z / (2 * n)
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    scale = 1 + z * z / n
    # Exactly 0 and 1 at the ends, where rounding would leave 1e-17.
    low = 0.0 if successes == 0 else (centre - half) / scale
    high = 1.0 if successes == n else (centre + half) / scale
    return low, high


Metric = Literal["accuracy", "validation_loss"]
"""What a validation measures: the share of correct answers, or the mean cross-entropy of the reference completions."""

BEST: dict[Metric, Literal["max", "min"]] = {"accuracy": "max", "validation_loss": "min"}
"""Whether the largest or the smallest value of a metric is the best."""


@dataclass(frozen=True)
class Accuracy:
    """How many answers are right, with the 95 % interval of the rate."""

    correct: int
    total: int

    def __post_init__(self) -> None:
        """Reject what is no proportion."""
        interval(self.correct, self.total)

    @property
    def rate(self) -> float:
        """Share of right answers, 0 to 1."""
        return self.correct / self.total

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson's 95 % interval of the rate."""
        return interval(self.correct, self.total)

    def __str__(self) -> str:
        """E.g. "84.0 % (42 of 50; 95 %: 71.5 to 91.7)"."""
        low, high = self.interval
        ends = f"{100 * low:.1f} to {100 * high:.1f}"
        return f"{100 * self.rate:.1f} % ({self.correct} of {self.total}; 95 %: {ends})"


def accuracy(results: Iterable[bool]) -> Accuracy:
    """Summary of the scores of a data set, at least one."""
    scores = list(results)
    return Accuracy(sum(map(bool, scores)), len(scores))


def majority(golds: Iterable[str]) -> Accuracy:
    """What giving the most frequent gold answer every time would score: the floor to beat."""
    counts = Counter(g.strip() for g in golds)
    return Accuracy(max(counts.values(), default=0), sum(counts.values()))


def percent(found: Accuracy) -> str:
    """E.g. "84.0 % (71.5 to 91.7)"."""
    low, high = found.interval
    return f"{100 * found.rate:.1f} % ({100 * low:.1f} to {100 * high:.1f})"
