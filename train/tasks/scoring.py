"""Exact match: extract the answer from an output, compare it with the gold answer, and summarise the accuracy."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from train.data.examples import Example
from train.data.fields import EmptyText, show
from train.tasks.extract import READERS, can_match, same_answer

Rule = Literal["exact", "digit", "tagged", "number", "label", "last_label", "truth", "relation"]
"""How to read the answer from an output:

exact       the whole text, stripped of surrounding white space
digit       the first digit anywhere in the text, the most lenient rule for a model that was never taught the format
tagged      the text inside the first <answer>...</answer>
number      the number in the last \\boxed{...}, else after the last "answer:" (or ####), else the last in the text
label       the label of a choice in the first "Answer: (B) ...", "Answer: Option1" or "the answer is answer3", else the
            label that the text begins with, else the only one in brackets
last_label  likewise, but in the last "Answer: ...", for an answer that follows its reasoning
truth       true or false: the first after "answer:", else the first in the text
relation    entailment, neutral or contradiction, likewise
"""


def extract(output: str, rule: Rule = "exact") -> str | None:
    """Extract the answer from a generated text.

    Args:
        output: the text, without stop tokens.
        rule: how to read the answer.

    Returns:
        The answer; None if the rule finds none.

    Raises:
        ValueError: an unknown rule.
    """
    if rule not in get_args(Rule):
        raise ValueError(f"scoring rule: got {rule!r}, need one of {', '.join(get_args(Rule))}")
    return READERS[rule](output)


def score(output: str, gold: str, rule: Rule = "exact") -> bool:
    """Whether the answer in a generated text equals the gold answer: the same text or label, or equal numbers."""
    answer = extract(output, rule)
    return answer is not None and same_answer(answer, gold, rule)


def check_gold(example: Example, rule: Rule) -> None:
    """Refuse an example that no output could answer rightly; a plain text asks nothing and passes.

    Raises:
        EmptyText: naming the source: the gold answer is empty.
        ValueError: naming the source: it is not of the kind that the rule reads.
    """
    gold = example.gold
    if gold is None:
        return
    if not gold.strip():
        raise EmptyText(f"{example.source}: the gold answer is empty")
    if not can_match(gold, rule):
        raise ValueError(
            f"{example.source}: the gold answer is {show(gold)}, which no output can match under the rule {rule!r}"
        )


def check_max_new_tokens(count: int) -> None:
    """Raise ValueError unless an answer may have a token."""
    if count < 1:
        raise ValueError(f"task.max_new_tokens must be at least 1, got {count}")


def interval(successes: int, n: int) -> tuple[float, float]:
    """Wilson's 95 % confidence interval of a proportion, accurate near 0 and 1 too.

    Wilson 1927, doi:10.1080/01621459.1927.10502953.

    Args:
        successes: number of successes.
        n: number of trials.

    Returns:
        Lower and upper end, in [0, 1].

    Raises:
        ValueError: unless 0 <= successes <= n and n > 0.
    """
    if not 0 <= successes <= n or n == 0:
        raise ValueError(f"interval: got {successes} successes of {n}, need 0 <= successes <= n and n > 0")
    import scipy.stats  # takes a second to import, and configs import this module

    ends = scipy.stats.binomtest(successes, n).proportion_ci(0.95, method="wilson")
    return float(ends.low), float(ends.high)


Metric = Literal["accuracy", "validation_loss", "pair_accuracy", "teacher_kl"]
"""What a validation measures.

accuracy         share of correct answers
validation_loss  mean cross-entropy of the reference completions, nats a token
pair_accuracy    share of the pairs whose chosen answer gained more log-probability than the rejected one
teacher_kl       mean KL from the teacher's next-token distribution to the student's, nats a token
"""

BEST: Mapping[str, Literal["max", "min"]] = {
    "accuracy": "max",
    "validation_loss": "min",
    "pair_accuracy": "max",
    "teacher_kl": "min",
}
"""Whether the largest or the smallest value of a metric is the best."""

SHORT_ANSWER = 5
"""Words of a completion that a model can be expected to repeat exactly."""


def is_checkable(examples: Sequence[Example], rule: Rule) -> bool:
    """Whether generated answers to most of the examples can be right or wrong.

    They can where an example has an answer of its own or choices, where the rule extracts an answer from the text, and
    where the whole completion is at most SHORT_ANSWER words on one line. Other completions are free text.
    """
    checkable = 0
    for example in examples:
        gold = example.gold
        text = gold is not None and "\n" not in gold and 0 < len(gold.split()) <= SHORT_ANSWER
        answered = example.answer is not None or bool(example.choices) or (gold is not None and rule != "exact")
        checkable += text or answered
    return 2 * checkable > len(examples)


@dataclass(frozen=True)
class Accuracy:
    """Number of right answers out of a total, with the 95 % interval of their rate."""

    correct: int
    total: int

    def __post_init__(self) -> None:
        """Reject counts that are not a proportion."""
        interval(self.correct, self.total)

    @property
    def rate(self) -> float:
        """Fraction of right answers, 0 to 1."""
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
    """Summarise the scores of a data set, of which there must be at least one."""
    scores = list(results)
    return Accuracy(sum(map(bool, scores)), len(scores))


def percent(result: Accuracy) -> str:
    """E.g. "84.0 % (71.5 to 91.7)"."""
    low, high = result.interval
    return f"{100 * result.rate:.1f} % ({100 * low:.1f} to {100 * high:.1f})"
