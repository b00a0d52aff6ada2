"""What the data pipeline passes on: an `Example` is text, a `TokenizedExample` is the token ids of one."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import numpy as np

Split = Literal["train", "validation", "test"]

Role = Literal["prompt", "completion", "text", "system", "user", "assistant"]
"""prompt and completion are plain text; text is plain text that is learned as a whole, yet steered like a prompt;
system, user and assistant are messages of a chat template."""

SUPERVISED: tuple[Role, ...] = ("completion", "assistant")
"""Roles whose text is the model's own: what it produces in answer to the turns before."""


class Turn(NamedTuple):
    """One piece of an example: a role and its text."""

    role: Role
    text: str

    @property
    def supervised(self) -> bool:
        """Whether this is a completion, in the sense of `TokenizedExample.completion`."""
        return self.role in SUPERVISED


@dataclass(frozen=True)
class Example:
    """A prompt with its completion, a conversation, or a plain text.

    turns    in order; the roles determine which are supervised
    source   where it was read, "file:line", for error messages
    answer   the gold answer; None if the last supervised text is the answer
    choices  candidate completions of a multiple-choice question, exactly one of them right; empty for a free answer
    weight   factor on the loss of all its targets, any finite real
    turn_weights  factor on the loss of each turn's targets besides; empty if all are 1
    """

    turns: tuple[Turn, ...]
    source: str
    answer: str | None = None
    choices: tuple[str, ...] = ()
    weight: float = 1.0
    turn_weights: tuple[float, ...] = ()

    @classmethod
    def of(
        cls,
        prompt: str,
        completion: str | None,
        source: str,
        answer: str | None = None,
        choices: tuple[str, ...] = (),
        weight: float = 1.0,
    ) -> Example:
        """An example of one plain prompt and, unless None, its completion."""
        turns: tuple[Turn, ...] = (Turn("prompt", prompt),)
        if completion is not None:
            turns += (Turn("completion", completion),)
        return cls(turns, source, answer, choices, weight)

    @property
    def gold(self) -> str | None:
        """The answer to score against: `answer`, else the last supervised text; None if there is neither."""
        if self.answer is not None:
            return self.answer
        return next((turn.text.strip() for turn in reversed(self.turns) if turn.supervised), None)

    @property
    def context(self) -> Example:
        """The example without its final supervised turn: what generation starts from."""
        if not self.turns or not self.turns[-1].supervised:
            return self
        return replace(self, turns=self.turns[:-1], answer=self.gold)


RUN = np.dtype([("length", "<i4"), ("completion", "<i4"), ("weight", "<f4")])
"""Neighbouring tokens of an example that are alike: how many, whether they belong to a completion, and their weight."""


class Run(NamedTuple):
    """The fields of RUN."""

    length: int
    completion: bool
    weight: float


@dataclass(frozen=True, eq=False)
class TokenizedExample:
    """One example as token ids.

    ids            int32 [n]
    completion     bool [n], the tokens that the model learns to produce
    prompt_length  number of tokens before the first completion token; n if there is none
    source         the example's source, for error messages
    answer         the example's gold answer, `Example.gold`
    weights        fp32 [n], any real: the weight of each token in the loss. Default: 1 for completion tokens, else 0
    """

    ids: np.ndarray
    completion: np.ndarray
    prompt_length: int
    source: str
    answer: str | None = None
    weights: np.ndarray = None  # type: ignore[assignment]  # never None after __post_init__

    def __post_init__(self) -> None:
        """Fill in the default weights."""
        if self.weights is None:
            object.__setattr__(self, "weights", np.asarray(self.completion, np.float32))

    def __len__(self) -> int:
        """Number of tokens."""
        return len(self.ids)

    def without(self, removed: slice) -> TokenizedExample:
        """The example without some tokens of its prompt."""
        return replace(
            self,
            ids=np.delete(self.ids, removed),
            completion=np.delete(self.completion, removed),
            weights=np.delete(self.weights, removed),
            prompt_length=self.prompt_length - (removed.stop - removed.start),
        )

    def runs(self) -> list[Run]:
        """Stretches of tokens that agree in completion flag and weight."""
        changes = (self.completion[1:] != self.completion[:-1]) | (self.weights[1:] != self.weights[:-1])
        starts = np.append(0, np.flatnonzero(changes) + 1)
        fields = (np.diff(np.append(starts, len(self))), self.completion[starts], self.weights[starts])
        return [Run(*run) for run in zip(*(field.tolist() for field in fields), strict=True)]

    def digest(self) -> bytes:
        """`digest_of_row` of the example."""
        return digest_of_row(self.ids, np.array(self.runs(), RUN))


DIGEST_BYTES = 16
"""Length of the digest of one example."""


def digest_of_row(ids: np.ndarray, runs: np.ndarray) -> bytes:
    """BLAKE2b of all that the loss and the steering see of a tokenised example.

    Args:
        ids: of its tokens.
        runs: RUN [m], which cover them; neighbours differ.
    """
    digest = hashlib.blake2b(np.asarray(ids, "<i4").tobytes(), digest_size=DIGEST_BYTES)
    digest.update(runs.tobytes())
    return digest.digest()


def digest_of(rows: Iterable[TokenizedExample]) -> str:
    """sha256, in hexadecimal, of all that the loss and the steering see of tokenised examples, in their order.

    Args:
        rows: their ids, completion flags and weights count; sources and answers do not.
    """
    return hashlib.sha256(b"".join(row.digest() for row in rows)).hexdigest()
