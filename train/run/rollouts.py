"""Rollouts: answers sampled from the present parameters, their rewards, and the rows in which they are learned from."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxsteer.batches import pack
from jaxsteer.groups import Group, shared_length, stack_groups
from jaxsteer.inference import Answer, Decoder, Limits, Request, Sampling, generate_all, nonfinite_logits
from jaxsteer.objectives import Rollouts, group_advantages
from jaxsteer.params import Params
from train.config.grpo import GrpoConfig
from train.data import Example, RowOrder, TokenizedExample
from train.data.examples import digest_of
from train.devices import interrupts
from train.run.training import Training
from train.tasks.rewards import WeightedReward


@dataclass(frozen=True, eq=False)
class PromptSource:
    """The questions that rollouts answer, in an order that is a function of the seed.

    examples_asked  with their right answers
    prompts         their tokens
    end             token that ends an answer
    config          the run
    files           where they come from, and those of the rewards
    by              what else decides the rewards, for the digest
    """

    examples_asked: Sequence[Example]
    prompts: Sequence[TokenizedExample]
    end: int
    config: GrpoConfig
    files: list[str]
    by: str = ""
    order: RowOrder = field(init=False, repr=False)
    """Which questions are in each batch of rollouts."""

    def __post_init__(self) -> None:
        """Lay out the order: a question is a row of its own."""
        ones = np.ones(len(self.prompts), np.int32)
        object.__setattr__(self, "order", RowOrder(ones, self.config.prompts, 1, self.config.seed, pack=False))

    @property
    def examples(self) -> Sequence[TokenizedExample]:
        """The prompts."""
        return self.prompts

    @property
    def batch_size(self) -> int:
        """Rows computed at a time."""
        return self.config.batch_size

    @property
    def fill(self) -> float:
        """Not known before there are answers."""
        return math.nan

    def steps(self, epochs: float) -> int:
        """Number of updates in this many passes over the questions."""
        return self.order.steps(epochs) * self.config.updates

    def asked(self, step: int) -> np.ndarray:
        """Numbers of the questions whose answers a step learns from, int [prompts]."""
        return np.concatenate(self.order.members(step // self.config.updates))

    def batch(self, step: int, rows: Iterable[int] | None = None) -> Rollouts:
        """Rows of the shape that a step computes at a time, without answers."""
        count = self.batch_size if rows is None else len(list(rows))
        return rollouts_in([[] for _ in range(count)], self.config, shared=self.config.share_prompts)

    def digest(self) -> str:
        """sha256, in hexadecimal, of the questions, their right answers, and what else decides the rewards."""
        golds = hashlib.sha256(repr([example.gold for example in self.examples_asked]).encode()).hexdigest()
        return hashlib.sha256(f"{digest_of(self.prompts)} {golds} {self.by}".encode()).hexdigest()

    def named(self, step: int) -> list[list[str]]:
        """The sources of the questions of a step, one to a row."""
        return [[self.prompts[i].source] for i in self.asked(step).tolist()]


class Sampled(NamedTuple):
    """An answer to a question.

    number   of the question
    tokens   int32 [n], the end included if it came to one
    text     without it
    rewards  one for each reward, without their factors
    reward   their weighted sum
    ended    whether it came to its end
    log_probabilities  fp32, of the tokens by the policy it was sampled from, at temperature 1; without the end
    """

    number: int
    tokens: np.ndarray
    text: str
    rewards: tuple[float, ...]
    reward: float
    ended: bool
    log_probabilities: np.ndarray


class Sampler:
    """Answers questions with the parameters of the moment, and rewards the answers.

    Args:
        training: the run.
        rewards: what answers are rewarded for.
    """

    def __init__(self, training: Training, rewards: Sequence[WeightedReward]) -> None:
        assert isinstance(training.config, GrpoConfig)
        assert isinstance(training.data, PromptSource)
        self._training, self._config, self._source = training, training.config, training.data
        self._rewards = rewards
        self._new = training.config.task.max_new_tokens
        longest = max(map(len, self._source.prompts))
        self._limits = Limits(longest, self._new, rows=min(training.config.eval_batch_size, 256), chunk=32)

    @property
    def prompts(self) -> Sequence[TokenizedExample]:
        """All prompts, by their numbers."""
        return self._source.prompts

    def example(self, number: int) -> Example:
        """A question."""
        return self._source.examples_asked[number]

    def sample(self, step: int, params: Params) -> list[list[Sampled]]:
        """The answers to a step's questions, a group for each; a function of (seed, step, parameters).

        Raises:
            FloatingPointError: the model's logits are not finite for a question.
            ValueError: a reward that fails.
        """
        config = self._config
        asked = self._source.asked(step).tolist()
        # One object for a question's answers: the decoder reads a prompt once for all requests that share it.
        prompts = {i: self._source.prompts[i] for i in asked}
        numbers = [i for i in asked for _ in range(config.group)]
        sampling = Sampling(config.temperature)
        requests = [
            Request(prompts[i], self._new, (self._source.end,), sampling, self._seed(step, place))
            for place, i in enumerate(numbers)
        ]
        answers = self._answers(requests, params)
        sampled = [self._rewarded(i, answer) for i, answer in zip(numbers, answers, strict=True)]
        return [sampled[first : first + config.group] for first in range(0, len(sampled), config.group)]

    def _seed(self, step: int, place: int) -> int:
        text = f"{self._config.seed} {step // self._config.updates} {place}"
        return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest())

    def _answers(self, requests: Sequence[Request], params: Params) -> list[Answer]:
        training, program = self._training, self._training.program
        base = training.loaded.base if params.base is None else params.base
        found: dict[int, Answer] = {}

        def told(number: int, so_far: np.ndarray) -> bool:
            interrupts.safe_point()
            return False

        with program.on_mesh():
            decoder = Decoder(program.model, base, params.steering, self._limits, program.placement.batch)
            for number, answer in generate_all(decoder, requests, told):
                if answer.finished == "nonfinite":
                    raise nonfinite_logits(requests[number].prompt, program.model.config.vocab_size)
                found[number] = answer
        return [found[number] for number in range(len(requests))]

    def _rewarded(self, number: int, answer: Answer) -> Sampled:
        text = self._training.loaded.require_tokenizer().decode(answer.tokens, skip_special_tokens=True)
        example, ended = self._source.examples_asked[number], answer.finished == "stop"
        rewards = tuple(reward.of(example, text) for reward in self._rewards)
        total = sum(reward.weight * value for reward, value in zip(self._rewards, rewards, strict=True))
        tokens = np.append(answer.tokens, [self._source.end] * ended).astype(np.int32)
        return Sampled(number, tokens, text, rewards, total, ended, answer.log_probabilities)


@dataclass(frozen=True, eq=False)
class _Continued:
    """A prompt with a sampled answer, as `jaxsteer.batches.Tokens`."""

    prompt: TokenizedExample
    answer: np.ndarray

    @property
    def ids(self) -> np.ndarray:
        return np.concatenate([self.prompt.ids, self.answer])

    @property
    def completion(self) -> np.ndarray:
        return np.concatenate([self.prompt.completion, np.ones(len(self.answer), bool)])

    @property
    def weights(self) -> np.ndarray:
        return np.repeat(np.array([0, 1], np.float32), [len(self.prompt), len(self.answer)])

    @property
    def prompt_length(self) -> int:
        return self.prompt.prompt_length

    @property
    def source(self) -> str:
        return self.prompt.source


class Learned(NamedTuple):
    """A group of answers in a row, and the advantage of each."""

    group: Group
    advantages: tuple[float, ...]


def learned_groups(
    sampled: Sequence[Sequence[Sampled]], prompts: Sequence[TokenizedExample], config: GrpoConfig, *, shared: bool
) -> list[Learned]:
    """The answers that change something, in pieces that fit a row: those whose advantage is 0 are left out.

    Raises:
        ValueError: naming the question: one answer does not fit a row.
    """
    advantages = group_advantages(np.array([[s.reward for s in group] for group in sampled]), config.policy.scale)
    found = []
    for answers, own in zip(sampled, advantages, strict=True):
        prompt = prompts[answers[0].number]
        kept = [
            (_Continued(prompt, answer.tokens), float(advantage))
            for answer, advantage in zip(answers, own, strict=True)
            if advantage and len(answer.tokens) and (answer.ended or config.keep_truncated)
        ]
        found += _pieces(kept, config.sequence_length, shared=shared)
    return found


def _pieces(answers: Sequence[tuple[Any, float]], length: int, *, shared: bool) -> list[Learned]:
    """Answers to one prompt as groups that fit a row of this length."""
    pieces: list[list[tuple[Any, float]]] = []
    for answer in answers:
        joined = [*pieces[-1], answer] if pieces else [answer]
        fits = pieces and _group([text for text, _ in joined], shared=shared).length <= length
        if fits:
            pieces[-1] = joined
        else:
            pieces.append([answer])
    return [
        Learned(_group([text for text, _ in piece], shared=shared), tuple(own for _, own in piece)) for piece in pieces
    ]


def _group(texts: Sequence[Any], *, shared: bool) -> Group:
    return Group(tuple(texts), shared_length(texts) if shared else 0)


def rollouts_in(rows: Sequence[Sequence[Learned]], config: GrpoConfig, *, shared: bool) -> Rollouts:
    """The rows [B, T] of groups, numpy; what depends on other models is 0."""
    grouped = stack_groups([[each.group for each in row] for row in rows], config.sequence_length, trunks=shared)
    advantages = np.zeros(grouped.group.shape, np.float32)
    for r, row in enumerate(rows):
        for g, each in enumerate(row, start=1):
            values = np.append(0, each.advantages).astype(np.float32)
            at = grouped.group[r] == g
            advantages[r, at] = values[grouped.member[r, at]]
    advantages *= np.asarray(grouped.batch.weights) != 0
    blank: Any = np.zeros_like(advantages)  # numpy on the host
    return Rollouts(grouped.batch, advantages, blank, blank, blank)  # type: ignore[arg-type]


MICROBATCHES = (1, 2, 3, 4, 6, 8)
"""Numbers of microbatches that are compiled for, and their doubles."""


def microbatches_of(learned: Sequence[Learned], config: GrpoConfig, *, shared: bool) -> Rollouts:
    """The rows of all groups as microbatches [M, B, T], numpy, filled up with empty rows: M is one of few numbers."""
    lengths = [each.group.length for each in learned]
    members = pack(lengths, config.sequence_length) if lengths else []
    needed = max(1, -(-len(members) // config.batch_size))
    sizes = sorted({size << doubled for size in MICROBATCHES for doubled in range(12)})
    count = next(size for size in sizes if size >= needed)
    rows = [[learned[i] for i in row] for row in members]
    rows += [[] for _ in range(count * config.batch_size - len(rows))]
    whole = rollouts_in(rows, config, shared=shared)
    shape = (count, config.batch_size)
    return jax.tree.map(lambda value: value.reshape(shape + value.shape[1:]), whole)
