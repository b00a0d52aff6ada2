"""What the data side passes on: an `Example` is text, a `TokenizedExample` is what a model is trained on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np

Role = Literal["prompt", "completion", "system", "user", "assistant"]
"""prompt and completion are plain text; system, user and assistant exist only in a chat template."""

SUPERVISED: tuple[Role, ...] = ("completion", "assistant")
"""Roles whose text the model learns to produce."""


class Turn(NamedTuple):
    """One piece of an example."""

    role: Role
    text: str

    @property
    def supervised(self) -> bool:
        """Whether the model learns to produce this text."""
        return self.role in SUPERVISED


@dataclass(frozen=True)
class Example:
    """A task or a conversation as text, before any tokenizer.

    turns   in order; what is supervised follows from the roles
    source  where it came from, "file:line", for messages
    answer  the gold answer; None where the last supervised text is itself the answer
    choices candidate completions, of which exactly one is right; empty for a free answer
    """

    turns: tuple[Turn, ...]
    source: str
    answer: str | None = None
    choices: tuple[str, ...] = ()

    @classmethod
    def of(
        cls,
        prompt: str,
        completion: str | None,
        source: str,
        answer: str | None = None,
        choices: tuple[str, ...] = (),
    ) -> Example:
        """One prompt and, unless None, its completion."""
        turns: tuple[Turn, ...] = (Turn("prompt", prompt),)
        if completion is not None:
            turns += (Turn("completion", completion),)
        return cls(turns, source, answer, choices)

    @property
    def gold(self) -> str | None:
        """The answer to score against: `answer`, else the last supervised text; None without either."""
        if self.answer is not None:
            return self.answer
        return next((t.text.strip() for t in reversed(self.turns) if t.supervised), None)

    @property
    def context(self) -> Example:
        """The example without its final supervised turn: what generation starts from."""
        if not self.turns or not self.turns[-1].supervised:
            return self
        return Example(self.turns[:-1], self.source, self.gold, self.choices)


@dataclass(frozen=True, eq=False)
class TokenizedExample:
    """One example as token ids.

    ids            int32 [n]
    completion     bool [n], the tokens that the model learns to produce
    prompt_length  number of tokens before the first of them; n where there are none
    source         of the example
    answer         `Example.gold`
    weights        fp32 [n], any real, each token's weight in the loss; by default 1 in completions, 0 elsewhere
    """

    ids: np.ndarray
    completion: np.ndarray
    prompt_length: int
    source: str
    answer: str | None = None
    weights: np.ndarray = None  # type: ignore[assignment]  # never None once made

    def __post_init__(self) -> None:
        """Fill in the weights."""
        if self.weights is None:
            object.__setattr__(self, "weights", np.asarray(self.completion, np.float32))

    def __len__(self) -> int:
        """Number of tokens."""
        return len(self.ids)
