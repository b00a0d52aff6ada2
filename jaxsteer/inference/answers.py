"""Answers to all of a number of requests, by a decoder of their own."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np

from jaxsteer.inference.decoder import Decoder
from jaxsteer.inference.events import Answer, Event, answer_of, joined
from jaxsteer.inference.scheduling import Request


def generate_all(
    decoder: Decoder,
    requests: Sequence[Request],
    ended: Callable[[int, np.ndarray], bool] | None = None,
) -> Iterator[tuple[int, Answer]]:
    """Answer every request, longest prompts first.

    Args:
        decoder: with nothing pending.
        requests: to answer.
        ended: called as ended(index, tokens so far) after every chunk with the index of an unfinished request; True
            ends the answer there, which then counts as stopped.

    Yields:
        (index of the request, its answer), as they finish.

    Raises:
        ValueError: the decoder has requests pending, or one of these does not fit it.
    """
    if decoder.pending:
        raise ValueError(f"generate_all needs a decoder to itself, but this one has {decoder.pending} requests pending")
    for request in requests:
        decoder.check(request)
    order = sorted(range(len(requests)), key=lambda index: -len(requests[index]))
    indices = {decoder.submit(requests[index]): index for index in order}
    received: dict[int, list[Event]] = {id: [] for id in indices}
    try:
        while received:
            for event in decoder.step(draining=True):
                if event.id not in received:  # cancelled by an earlier call that was not read to its end
                    continue
                received[event.id].append(event)
                if event.finished:
                    yield indices[event.id], answer_of(received.pop(event.id))
                elif ended and ended(indices[event.id], joined(received[event.id], "tokens")):
                    decoder.cancel(event.id)
    finally:
        for id in received:
            decoder.cancel(id)
