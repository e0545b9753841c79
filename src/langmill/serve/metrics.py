"""/metrics, in Prometheus' text format: what waits, what runs, how fast, what was refused. It holds no text of anybody.

Each process has a registry of its own. With several workers a scrape reaches one of them, and the label `worker`, its
process id, stands on every sample, so that no series is made of two workers' counts.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

from fastapi import APIRouter
from fastapi.responses import Response
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from langmill.serve.models import Models
from langmill.serve.state import State

FIRST = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
BETWEEN = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 1, 5)
WHOLE = (0.01, 0.05, 0.1, 0.5, 1, 5, 10, 30, 60, 300)
GAUGES = {
    "requests": "Requests in the engine",
    "queued": "Requests that wait for a slot",
    "queued_tokens": "Tokens of prompts that wait",
    "slots": "Slots in use",
}


class Metrics:
    """What the routes count; see `writing.write` and logs.py for who calls."""

    def __init__(self, models: Models) -> None:
        self.registry = CollectorRegistry()
        self.registry.register(Engines(models))
        one = ["model"]
        counter = partial(Counter, registry=self.registry, namespace="langmill")
        histogram = partial(Histogram, registry=self.registry, namespace="langmill")
        self._first = histogram(
            "time_to_first_token_seconds", "From request to first token", one, buckets=FIRST
        )
        self._between = histogram("inter_token_seconds", "Between what a stream gets", one, buckets=BETWEEN)
        self._ended = counter("choices", "Answers by how they ended", ["model", "finish"])
        self._prompt = counter("prompt_tokens", "Tokens read", one)
        self._cached = counter("cached_tokens", "Of the tokens read those that were known", one)
        self._written = counter("written_tokens", "Tokens written", one)
        self._refused = counter("refused", "Requests refused, by reason", ["reason"])
        self._requests = counter("requests", "Requests by route and status", ["method", "route", "status"])
        self._seconds = histogram("request_seconds", "Of whole requests", ["route"], buckets=WHOLE)

    def first(self, model: str, seconds: float) -> None:
        """A choice got its first token."""
        self._first.labels(model).observe(seconds)

    def between(self, model: str, seconds: float) -> None:
        """A choice got its next token or tokens."""
        self._between.labels(model).observe(seconds)

    def ended(self, model: str, finish: str, prompt: int, cached: int, written: int) -> None:
        """A choice ended."""
        self._ended.labels(model, finish).inc()
        self._prompt.labels(model).inc(prompt)
        self._cached.labels(model).inc(cached)
        self._written.labels(model).inc(written)

    def refused(self, reason: str) -> None:
        """A request was answered with an error."""
        self._refused.labels(reason).inc()

    def request(self, method: str, route: str, status: int, seconds: float) -> None:
        """A request is over. route: as the application has it, so that there are few."""
        self._requests.labels(method, route, str(status)).inc()
        self._seconds.labels(route).observe(seconds)


class Engines(Collector):
    """What the engines say of themselves when they are asked."""

    def __init__(self, models: Models) -> None:
        self.models = models

    def collect(self) -> Iterator[Metric]:
        """One gauge for each of GAUGES, one counter for everything that the engines count."""
        engines = [(one.name, one.service) for one in self.models.all if one.service is not None]
        used = {one.name: one.accounting() for one in self.models.all if one.parent is None}
        for key, about in GAUGES.items():
            gauge = GaugeMetricFamily(f"langmill_engine_{key}", about, labels=["model"])
            for name, accounting in used.items():
                gauge.add_metric([name], accounting[key])
            yield gauge
        counts = CounterMetricFamily(
            "langmill_engine_events", "What the engines did", labels=["model", "event"]
        )
        for name, service in engines:
            for event, count in sorted(service.counts().items()):
                counts.add_metric([name, event.replace(" ", "_")], count)
        yield counts


@dataclass(frozen=True)
class Labelled(Collector):
    """Another registry's metrics, with one label more."""

    registry: CollectorRegistry
    worker: str

    def collect(self) -> Iterator[Metric]:
        """All of them."""
        for metric in self.registry.collect():
            metric.samples = [
                one._replace(labels={**one.labels, "worker": self.worker}) for one in metric.samples
            ]
            yield metric


def router(state: State) -> APIRouter:
    """The route over this state."""
    made, shown = APIRouter(tags=["server"]), state.metrics.registry
    if state.settings.workers > 1:
        shown = CollectorRegistry()
        shown.register(Labelled(state.metrics.registry, str(os.getpid())))

    @made.get("/metrics", response_class=Response)
    def metrics() -> Response:
        """Counters, gauges and histograms in Prometheus' text format."""
        return Response(generate_latest(shown), media_type=CONTENT_TYPE_LATEST)

    return made
