"""Clients of an engine, as tests need them."""

import threading
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from tiny_model import TINY

from jaxsteer.inference import Request
from train.data import TokenizedExample
from train.serving.engine import EngineError

NEW = 12
"""Tokens of an answer, unless a test asks for others."""


def prompt(number, length=9):
    ids = np.random.default_rng(number).integers(3, TINY.vocab_size, length).astype(np.int32)
    return TokenizedExample(ids, np.zeros(length, bool), length, f"prompt {number}")


@dataclass
class Listening:
    """A listener that keeps what it hears."""

    heard: list = field(default_factory=list)
    first: threading.Event = field(default_factory=threading.Event)
    ended: threading.Event = field(default_factory=threading.Event)
    on_first: Callable = lambda: None

    def __call__(self, news):
        self.heard.append(news)
        if not self.first.is_set():
            self.on_first()
        self.first.set()
        if isinstance(news, EngineError) or news.finished:
            self.ended.set()

    def wait(self):
        assert self.ended.wait(60)
        return self.heard[-1]

    def tokens(self):
        last = self.wait()
        if isinstance(last, EngineError):
            raise last
        return np.concatenate([event.tokens for event in self.heard]).tolist()


def request(engine, number, name="tiny", strength=None, new=NEW, **options):
    served = engine.roster.get(name)
    return Request(prompt(number), new, strength=served.strength(strength), adapter=served.adapter, **options)


def ask(engine, *arguments, deadline=None, **options):
    listening = Listening()
    job = engine.submit(request(engine, *arguments, **options), listening, deadline=deadline)
    return job, listening


def settle(engine):
    """Return once the engine has obeyed all that it was told before."""
    engine.run(lambda network, adapters: None).result(60)
    engine.run(lambda network, adapters: None).result(60)


def finish(engine):
    """Return once all jobs have ended and nothing is left of them."""
    while engine.stats().active + engine.stats().waiting:
        settle(engine)
    settle(engine)
