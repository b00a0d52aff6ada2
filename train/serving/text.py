"""The text of an answer as its tokens come: characters that span tokens, stop strings, and the text of each token."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np

from jaxsteer.inference.events import Event
from train.evaluation.replies import CONTEXT, UNFINISHED

Decode = Callable[[Sequence[int]], str]
"""Token ids to text: a tokenizer's `decode`."""

End = Literal["stop", "length"]
"""Why an answer ended: a stop token or stop string, or its maximum number of tokens."""

WINDOW = 64
"""Tokens that are decoded again for each new one, at most."""


class Alternative(NamedTuple):
    """One of the most likely tokens at a step: its id, its text there, and its natural log-probability."""

    id: int
    text: str
    log_probability: float


class Token(NamedTuple):
    """A token of an answer.

    id               of the token
    text             what it adds to the text before it: "" for all but the last token of a character. The texts of all
                     tokens make the text of the answer
    log_probability  natural logarithm, of the model's own distribution
    top              the most likely tokens there, likeliest first; empty if the request did not ask
    """

    id: int
    text: str
    log_probability: float
    top: tuple[Alternative, ...] = ()


class Delta(NamedTuple):
    """What an event adds to an answer.

    text      to append; never taken back
    tokens    that the text is made of, those of which all text is out; empty unless asked for
    finished  why the answer ended; None while it has not
    """

    text: str
    tokens: tuple[Token, ...] = ()
    finished: End | None = None


class TextOfAnswer:
    """Turns the events of a request into text.

    Nothing of a stop string is ever given out: text that may begin one is held back. The token in which it begins is
    cut there, or left out if nothing of it remains.

    Args:
        decode: token ids to text; for answers `partial(tokenizer.decode, skip_special_tokens=True)`.
        stop: strings that end the answer, not part of it.
        tokens: whether each `Delta` has its tokens, which takes longer.

    Attributes:
        text: given out so far.
        generated: number of tokens generated so far, those of a stop string included.
        finished: why the answer ended; None while it has not. After a stop string, the reader cancels the job.
    """

    def __init__(self, decode: Decode, stop: Sequence[str] = (), *, tokens: bool = False) -> None:
        raise NotImplementedError

    def push(self, event: Event) -> Delta:
        """The text to append after an event; nothing once the answer has `finished`.

        Raises:
            ValueError: the event is of an answer that was cancelled, or whose logits were not finite.
        """
        raise NotImplementedError


def pieces(ids: Sequence[int], decode: Decode) -> list[str]:
    """The text that each token adds to those before it; together they are the text of all."""
    raise NotImplementedError
