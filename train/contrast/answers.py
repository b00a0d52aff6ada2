"""Generated answers: what a scorer says of them, how fluent they are, and how much they repeat themselves."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from jaxsteer.inference import Decoder, generate_all
from jaxsteer.inference.events import Answer
from jaxsteer.inference.likelihood import score_continuations
from jaxsteer.inference.scheduling import Limits, Request
from jaxsteer.io import Tokenizer
from jaxsteer.models.transformer import Network
from train.data import TokenizedExample
from train.data.fields import show
from train.evaluation.statistics import Estimate, crossed_interval
from train.tasks.rewards import code_files, finite_number
from train.tasks.row_sources import digest_of_file

WINDOW = 3
"""Tokens in a row that count as repeated if the answer had them before."""


@dataclass(frozen=True)
class Scorer:
    """A function (prompt, answer) -> number, as the user named it."""

    name: str
    function: Callable[[str, str], float]

    def of(self, prompt: str, source: str, answer: str) -> float:
        """The score of an answer.

        Raises:
            ValueError: naming the prompt: the function raises an error, or gives something else than a finite number.
        """
        where = f"--scorer {self.name}: {source}, answer {show(answer)}"
        return finite_number(lambda: self.function(prompt, answer), where)


class Asked(NamedTuple):
    """A prompt as text and as tokens."""

    text: str
    tokens: TokenizedExample


class Answered(NamedTuple):
    """What is said of the answers to all prompts.

    texts       the answers
    score       the mean of the scorer's numbers; None without a scorer
    fluency     mean log-probability of their tokens under the untouched model, nats; NaN if all are empty
    repetition  share of the runs of `WINDOW` tokens that their answer had before
    """

    texts: tuple[str, ...]
    score: Estimate | None
    fluency: float
    repetition: float


@dataclass(frozen=True)
class Answering:
    """How prompts are answered.

    asked           the prompts
    tokenizer       of the model
    stop            tokens that end an answer
    max_new_tokens  maximum number of tokens in one
    scorer          what answers are scored by, if anything
    """

    asked: Sequence[Asked]
    tokenizer: Tokenizer
    stop: tuple[int, ...]
    max_new_tokens: int
    scorer: Scorer | None = None

    @property
    def by(self) -> str:
        """The scorer's name, with the digest of its file."""
        if self.scorer is None:
            return ""
        name = self.scorer.name
        return " ".join([name, *(digest_of_file(Path(file)) for file in code_files([name]))])

    def answer(self, network: Network, slot: str, strengths: Sequence[float]) -> list[Answered]:
        """Answer every prompt greedily at each strength of a slot; 0 of a network without one is the network itself."""
        longest = max(len(each.tokens) for each in self.asked)
        limits = Limits(longest, self.max_new_tokens, rows=min(64, len(self.asked) * len(strengths)))
        has = {each.name for each in network.model.plan} & {slot}
        requests = [
            Request(each.tokens, self.max_new_tokens, self.stop, strength=dict.fromkeys(has, strength))
            for strength in strengths
            for each in self.asked
        ]
        decoder = Decoder(network.model, network.base, network.steering, limits)
        found = dict(generate_all(decoder, requests))
        plain, n = Network(replace(network.model, plan=()), network.base, {}), len(self.asked)
        return [self._said(plain, [found[k * n + i] for i in range(n)]) for k in range(len(strengths))]

    def _said(self, plain: Network, answers: Sequence[Answer]) -> Answered:
        texts = tuple(self.tokenizer.decode(answer.tokens, skip_special_tokens=True) for answer in answers)
        score = None
        if self.scorer is not None:
            scores = [
                self.scorer.of(each.text, each.tokens.source, text)
                for each, text in zip(self.asked, texts, strict=True)
            ]
            score = crossed_interval([scores])
        tokens = [answer.tokens for answer in answers]
        return Answered(texts, score, self._fluency(plain, tokens), repetition(tokens))

    def _fluency(self, plain: Network, answers: Sequence[np.ndarray]) -> float:
        given = [i for i, answer in enumerate(answers) if len(answer)]
        if not given:
            return float("nan")
        prompts, texts = [self.asked[i].tokens for i in given], [[answers[i]] for i in given]
        scored = [score for _, (score,) in score_continuations(plain.model, plain.base, {}, prompts, texts)]
        return sum(score.log_probability for score in scored) / sum(score.tokens for score in scored)


def repetition(answers: Sequence[np.ndarray]) -> float:
    """The share of the runs of `WINDOW` tokens that their answer had before; 0 if there are none."""
    repeated = total = 0
    for answer in answers:
        runs = [tuple(answer[i : i + WINDOW].tolist()) for i in range(len(answer) - WINDOW + 1)]
        repeated, total = repeated + len(runs) - len(set(runs)), total + len(runs)
    return repeated / total if total else 0.0
