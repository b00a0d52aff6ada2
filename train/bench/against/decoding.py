"""Greedy decoding of the same questions: one batch of each size, and a whole set."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar

import jax
import numpy as np

from jaxsteer.batches import bucket_length, stack_rows
from jaxsteer.inference import Decoder, Limits, Request, generate_all
from jaxsteer.inference.generate import generate, to_device
from jaxsteer.models.transformer import Model, Network
from jaxsteer.plans import parse_plan
from jaxsteer.steering import init_steering
from train.bench.against.arena import MARGIN, Arena
from train.bench.against.bound import decoding_needs
from train.bench.against.contest import Better, Contest, Part, Side
from train.data import TokenizedExample
from train.peers import Conversation

COMPARED = 8
"""Questions of a set whose answers are compared before it is measured."""


class Ours:
    """Our answers to questions, steered."""

    def __init__(self, arena: Arena, plan: str) -> None:
        self._new_tokens = arena.config.new_tokens
        parsed = parse_plan((plan,), arena.loaded.config)
        steering = init_steering(parsed, arena.loaded.config, jax.random.key(0), base=arena.loaded.base)
        self._plain = Network(Model(arena.loaded.config, parsed), arena.loaded.base, steering)
        # Not the initial steering: multiplying by its zeros might be cheaper than what training makes of them.
        self._steered = replace(self._plain, steering=jax.tree.map(lambda leaf: leaf + 1e-3, steering))

    def batch(self, prompts: Sequence[TokenizedExample], *, plain: bool = False) -> np.ndarray:
        """Answers [B, M] to one batch; plain: with the initial steering, which changes nothing."""
        network = self._plain if plain else self._steered
        width = bucket_length(max(map(len, prompts)))
        batch = to_device(stack_rows([[prompt] for prompt in prompts], width))
        # There is no token -1 to stop at.
        made = generate(
            network.model, network.base, network.steering, batch, max_new_tokens=self._new_tokens, stop_tokens=(-1,)
        )
        return self._whole([np.asarray(made.tokens)[row, :length] for row, length in enumerate(made.lengths)])

    def set(self, prompts: Sequence[TokenizedExample], rows: int, *, plain: bool = False) -> np.ndarray:
        """Answers [N, M] to a whole set, from `rows` rows that are refilled."""
        network = self._plain if plain else self._steered
        limits = Limits(bucket_length(max(map(len, prompts))), self._new_tokens, rows)
        decoder = Decoder(network.model, network.base, network.steering, limits)
        requests = [Request(prompt, self._new_tokens) for prompt in prompts]
        answers = dict(generate_all(decoder, requests))
        return self._whole([answers[i].tokens for i in range(len(prompts))])

    def _whole(self, answers: Sequence[np.ndarray]) -> np.ndarray:
        """Answers [N, M], refused if one has ended early: that would be less work."""
        if short := [len(answer) for answer in answers if len(answer) < self._new_tokens]:
            raise ValueError(
                f"an answer ended after {short[0]} of {self._new_tokens} tokens; its logits are not finite"
            )
        return np.stack(answers)


def timed(call: Any, *args: Any) -> float:
    """Seconds of a call that waits for its result."""
    began = time.perf_counter()
    call(*args)
    return time.perf_counter() - began


def compare(name: str, peer: Conversation, prompts: Sequence[TokenizedExample], ours: np.ndarray) -> dict[str, Any]:
    """Hold our unsteered answers against the peer's.

    Raises:
        ValueError: a token differs that rounding cannot explain: both sides do not do the same work.
    """
    asked = [prompt.ids.tolist() for prompt in prompts]
    said = peer.ask("generate", prompts=asked, new_tokens=ours.shape[1], margins=True)
    theirs, margins = np.array(said["tokens"]), np.array(said["margins"])
    if theirs.shape != ours.shape:
        raise ValueError(f"{name}: the peer's answers are {list(theirs.shape)}, ours {list(ours.shape)}")
    same = np.cumprod(ours == theirs, axis=1).sum(axis=1)
    for row, count in enumerate(same):
        if count < ours.shape[1] and margins[row, count] > MARGIN:
            raise ValueError(
                f"{name}: the answers to {prompts[row].source} differ at token {count + 1}, which the peer prefers by "
                f"{margins[row, count]:.4f}; the sides do not do the same work, so nothing is measured"
            )
    return {"answers": len(same), "answers_agreeing": int(np.sum(same == ours.shape[1]))}


def their_side(peer: Conversation, prompts: Sequence[TokenizedExample], rows: int, new_tokens: int, work: int) -> Side:
    """The peer's `generate` on batches of questions, longest first; `work` is what one answer counts."""
    ordered = sorted(prompts, key=lambda prompt: -len(prompt))
    batches = [[prompt.ids.tolist() for prompt in ordered[at : at + rows]] for at in range(0, len(ordered), rows)]
    ask = lambda batch: float(peer.ask("generate", prompts=batch, new_tokens=new_tokens)["seconds"])
    return Side(f"transformers, batches of {rows}", [Part(partial(ask, batch), work * len(batch)) for batch in batches])


@dataclass(frozen=True)
class DecodingRow:
    """Batches of one size, steered, against transformers' `generate` of the plain model.

    plan        what steers
    batch_size  questions in a batch
    batches     in a round
    """

    name: str
    group: str
    title: str
    plan: str
    batch_size: int
    batches: int
    unit: ClassVar[str] = "tokens/s"
    better: ClassVar[Better] = "higher"

    @contextmanager
    def contest(self, arena: Arena) -> Iterator[Contest]:
        """Both sides, their answers to the first batch compared."""
        prompts, new_tokens = arena.prompts(self.batch_size * self.batches), arena.config.new_tokens
        prompts.sort(key=lambda prompt: -len(prompt))
        batches = [prompts[at : at + self.batch_size] for at in range(0, len(prompts), self.batch_size)]
        ours = Ours(arena, self.plan)
        with arena.peer() as peer:
            checked = compare(self.name, peer, batches[0], ours.batch(batches[0], plain=True))
            parts = [Part(partial(timed, ours.batch, batch), new_tokens * len(batch)) for batch in batches]
            theirs = their_side(peer, prompts, self.batch_size, new_tokens, new_tokens)
            needed = decoding_needs(arena.loaded.config, [*map(len, prompts)], new_tokens, self.batch_size)
            yield Contest(Side("jaxsteer", parts), [theirs], checked, needed)


@dataclass(frozen=True)
class EvaluationRow:
    """A whole set of questions, steered, in rows that are refilled.

    plan   what steers
    rows   questions that are answered at a time
    tried  batch sizes that transformers chooses from; without one the opponent is jaxsteer, one question at a time
    """

    name: str
    group: str
    title: str
    plan: str
    rows: int
    tried: tuple[int, ...]
    unit: ClassVar[str] = "examples/s"
    better: ClassVar[Better] = "higher"

    @contextmanager
    def contest(self, arena: Arena) -> Iterator[Contest]:
        """Both sides, some of their answers compared."""
        prompts, new_tokens = arena.prompts(arena.config.questions), arena.config.new_tokens
        rows, ours = min(self.rows, len(prompts)), Ours(arena, self.plan)
        mine = Side("jaxsteer", [Part(partial(timed, ours.set, prompts, rows), len(prompts))])
        needed = decoding_needs(arena.loaded.config, [*map(len, prompts)], new_tokens, rows)
        if not self.tried:
            yield Contest(mine, [_alone(ours, prompts)], {}, needed)
            return
        with arena.peer() as peer:
            answers = ours.set(prompts, rows, plain=True)[:COMPARED]
            checked = compare(self.name, peer, prompts[:COMPARED], answers)
            sizes = sorted({min(size, len(prompts)) for size in self.tried})
            theirs = [their_side(peer, prompts, size, new_tokens, 1) for size in sizes]
            yield Contest(mine, theirs, checked, needed)


def _alone(ours: Ours, prompts: Sequence[TokenizedExample]) -> Side:
    """One question at a time: some of evenly spread lengths, since the whole set would take very long."""
    ordered = sorted(prompts, key=len)
    count = min(COMPARED, len(ordered))
    some = [ordered[int((i + 0.5) * len(ordered) / count)] for i in range(count)]
    return Side("jaxsteer, one at a time", [Part(partial(timed, ours.set, [prompt], 1), 1) for prompt in some])
