"""Figures for Prometheus: what was asked, how long it took, and what the engine is doing."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from train.serving.engine import EngineStats

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

_REQUESTS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 60, 120, 300)
_TOKENS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1)
"""Upper bounds of histograms' buckets, in seconds."""

_GAUGES = {
    "active": ("running", "Requests being decoded"),
    "waiting": ("waiting", "Requests that wait for a row"),
    "rows": ("rows", "Rows allocated, free ones included"),
}
_COUNTERS = {
    "cancelled": ("cancelled", "Requests whose client left, and answers that a stop string ended"),
    "failed": ("failed", "Requests that the engine ended with an error"),
    "new_tokens": ("decoded_tokens", "Tokens generated, also those that nobody read"),
    "prefix_hits": ("prefix_hits", "Prompts that began like an earlier one"),
    "prefix_tokens_reused": ("prefix_tokens_reused", "Tokens of prompts that were not read again"),
    "restarts": ("engine_restarts", "Decoders that were replaced after a failed step"),
}
"""Figures of the engine: field of `EngineStats`, and the metric's name and description."""


class Metrics:
    """All metrics, in a registry of their own. Their names begin with jaxsteer_.

    Args:
        stats: gives the engine's figures of now.
    """

    def __init__(self, stats: Callable[[], EngineStats]) -> None:
        self.registry = CollectorRegistry()
        counter = lambda name, text, labels: Counter(f"jaxsteer_{name}", text, labels, registry=self.registry)
        histogram = lambda name, text, labels, buckets: Histogram(
            f"jaxsteer_{name}_seconds", text, labels, buckets=buckets, registry=self.registry
        )
        self.requests = counter("requests", "Requests by their HTTP status", ("route", "model", "status"))
        self.prompt_tokens = counter("prompt_tokens", "Tokens of prompts", ("model",))
        self.answer_tokens = counter("answer_tokens", "Tokens of answers", ("model",))
        self.latency = histogram("request", "From the request to the end of its response", ("route",), _REQUESTS)
        self.first_token = histogram("time_to_first_token", "Until the first token of an answer", ("model",), _REQUESTS)
        self.per_token = histogram("time_per_token", "For each further token of an answer", ("model",), _TOKENS)
        self.registry.register(_EngineFigures(stats))

    def text(self) -> bytes:
        """The figures as Prometheus reads them."""
        return generate_latest(self.registry)


class _EngineFigures:
    """Asks the engine when Prometheus asks."""

    def __init__(self, stats: Callable[[], EngineStats]) -> None:
        self._stats = stats

    def collect(self) -> Iterator[Metric]:
        """The engine's figures."""
        stats = self._stats()
        for field, (name, text) in _GAUGES.items():
            yield GaugeMetricFamily(f"jaxsteer_{name}", text, value=getattr(stats, field))
        for field, (name, text) in _COUNTERS.items():
            yield CounterMetricFamily(f"jaxsteer_{name}", text, value=getattr(stats, field))

    def describe(self) -> Iterator[Metric]:
        """Nothing: the names are known without asking the engine."""
        return iter(())


class Timer:
    """Times the tokens of one answer.

    Args:
        metrics: that are told.
        model: whose answer it is, asked for now.
    """

    def __init__(self, metrics: Metrics, model: str) -> None:
        self._metrics, self._model, self._asked = metrics, model, time.perf_counter()
        self._first: float | None = None

    def got(self, tokens: int, now: float) -> None:
        """Note that the answer has some tokens at `now`, of `time.perf_counter`."""
        if self._first is None and tokens:
            self._first, self._at_first = now, tokens
            self._metrics.first_token.labels(self._model).observe(now - self._asked)

    def ended(self, tokens: int, now: float) -> None:
        """Note that the answer has ended with some tokens."""
        self.got(tokens, now)
        if self._first is not None and tokens > self._at_first:
            self._metrics.per_token.labels(self._model).observe((now - self._first) / (tokens - self._at_first))
