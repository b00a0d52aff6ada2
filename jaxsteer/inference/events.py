"""What a decoder reports of its requests: tokens as they come, and answers when they are finished."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from jaxsteer.inference.draws import Top

Finished = Literal["stop", "length", "cancelled", "nonfinite"]
"""Why an answer ended: a stop token was drawn, it reached its maximum number of tokens, it was cancelled, or the model
gave logits that are not finite, from which nothing can be drawn."""


class Event(NamedTuple):
    """News of a request.

    id                 as returned by `Decoder.submit`
    tokens             int32 [n], new since the request's last event, without the stop token
    log_probabilities  fp32 [n], of these tokens, natural logarithm; of the model's own distribution, before
                       temperature, top-k and top-p
    finished           why the answer ended; None while it has not
    margin             the smallest difference between the two largest logits at any token so far, the stop token
                       included: where it is below rounding errors (1e-4 in fp32), another batch may give another token
    top                the likeliest tokens in place of each of these, [n, K]; None unless the request asks
    """

    id: int
    tokens: np.ndarray
    log_probabilities: np.ndarray
    finished: Finished | None
    margin: float
    top: Top | None = None


class Answer(NamedTuple):
    """A finished answer.

    tokens             int32 [n], without the stop token
    finished           why it ended; "nonfinite": the tokens before the logits were not finite, see `nonfinite_logits`
    margin             see `Event`
    log_probabilities  fp32 [n], see `Event`
    top                [n, K], see `Event`
    """

    tokens: np.ndarray
    finished: Finished
    margin: float
    log_probabilities: np.ndarray
    top: Top | None = None

    @property
    def stopped(self) -> bool:
        """Whether the answer came to its end: a stop token, or its reader had enough."""
        return self.finished in ("stop", "cancelled")


def top_of(top: Top | None, row: int, new: int, count: int) -> Top | None:
    """The `count` likeliest tokens in place of each new token of a row, from all rows'; None for a count of 0."""
    return Top(*(field[row, :new, :count].copy() for field in top)) if top and count else None


def joined(events: Sequence[Event], field: str) -> np.ndarray:
    """A field of all events of a request, one after the other."""
    return np.concatenate([getattr(event, field) for event in events])


def answer_of(events: Sequence[Event]) -> Answer:
    """The answer that all events of a request make."""
    finished, margin = events[-1].finished, events[-1].margin
    assert finished is not None
    tops = [event.top for event in events if event.top is not None]
    fields: Any = map(np.concatenate, zip(*tops, strict=True))  # numpy on the host
    top = Top(*fields) if tops else None
    return Answer(joined(events, "tokens"), finished, margin, joined(events, "log_probabilities"), top)
