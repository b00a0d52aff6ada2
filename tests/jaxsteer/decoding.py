"""Shared by the tests of decoding: prompts, requests, a reader of events, and which programs are compiled."""

from dataclasses import dataclass

import numpy as np

from jaxsteer import Sampling
from jaxsteer.inference import Limits, Request, prefill, resizing
from jaxsteer.inference import rows as device
from jaxsteer.models import by_layer

NEW = 7
TIE = 1e-4
LIMITS = Limits(max_prompt=24, max_new_tokens=NEW, rows=4)


@dataclass(frozen=True)
class Prompt:
    ids: np.ndarray
    completion: np.ndarray
    weights: np.ndarray
    prompt_length: int
    source: str = "here"


def prompts(vocab, count=23, longest=24):
    """Lengths over several buckets; every fourth is a second turn, with a completion before it."""
    draw = np.random.default_rng(0)
    made = []
    for i in range(count):
        ids = draw.integers(3, vocab, draw.integers(1, longest)).astype(np.int32)
        weights = np.zeros(len(ids), np.float32)
        if i % 4 == 0 and len(ids) > 6:
            weights[3:5] = 1
        made.append(Prompt(ids, weights > 0, weights, 3 if weights.any() else len(ids)))
    return made


def until(answer, stops, limit=NEW):
    """The answer before its first stop token or up to its limit, and whether it stopped."""
    ends = [i for i, token in enumerate(answer[:limit]) if token in stops]
    return (answer[: ends[0]], True) if ends else (answer[:limit], False)


def requests(asked, stops=(), **settings):
    return [Request(prompt, NEW, stops, **settings) for prompt in asked]


def mixed(asked, stops):
    """Requests that differ in all settings."""
    kinds = (Sampling(), Sampling(5.0), Sampling(3.0, 20), Sampling(5.0, 0, 0.9), Sampling(4.0, 30, 0.95))
    return [
        Request(prompt, 1 + i % NEW, stops if i % 2 else (), kinds[i % 5], seed=(i << 40) + i)
        for i, prompt in enumerate(asked)
    ]


class Reader:
    """Collects what a decoder reports, by request."""

    def __init__(self, decoder):
        self.decoder, self.parts, self.finished = decoder, {}, {}

    def step(self):
        for event in self.decoder.step():
            assert event.id not in self.finished, "an event after the end"
            assert len(event.tokens) == len(event.log_probabilities)
            assert len(event.tokens) <= self.decoder.limits.chunk + 1
            assert len(event.tokens) or event.finished
            self.parts.setdefault(event.id, []).append(event)
            if event.finished:
                self.finished[event.id] = event.finished

    def drain(self):
        while self.decoder.pending:
            self.step()
        return [self.tokens(id) for id in sorted(self.finished)]

    def tokens(self, id):
        return np.concatenate([event.tokens for event in self.parts[id]]).tolist()


def answers_of(decoder, asked):
    reader = Reader(decoder)
    for request in asked:
        decoder.submit(request)
    return reader.drain()


def compiled():
    """How often each program of a decoder has been compiled, by its name."""
    modules = (prefill, resizing, device, by_layer)
    programs = {name: program for module in modules for name, program in vars(module).items()}
    return {name: program._cache_size() for name, program in programs.items() if hasattr(program, "_cache_size")}
