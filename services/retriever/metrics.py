"""What Prometheus reads on /metrics. One registry an app, so that two apps in a process do not add up."""

from __future__ import annotations

import functools
from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)


class Metrics:
    """`part` is an owner's name: dense, bm25, rerank; or web, web_pages. `backend` is what a request asked:
    dense, bm25, hybrid or web."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        name = "forage_retriever_{}".format
        requests = Counter(name("requests"), "Answers of /retrieve by HTTP status.", ["status"], registry=registry)
        self.errors = Counter(name("errors"), "Requests that got no passages, by reason.", ["reason"], registry=registry)
        queries = Counter(name("queries"), "Queries answered with passages.", ["backend"], registry=registry)
        # Looked up for every request, and a look-up costs more than reading the request's body.
        self.requests, self.queries = functools.cache(requests.labels), functools.cache(queries.labels)
        self.request_seconds = Histogram(
            name("request_seconds"), "Seconds from request to answer.", buckets=SECONDS, registry=registry
        )
        self.batch_size = Histogram(name("batch_size"), "Queries computed together.", ["part"], buckets=SIZES, registry=registry)
        self.stage_seconds = Histogram(
            name("stage_seconds"), "Seconds that a stage took for one batch.", ["part", "stage"], buckets=SECONDS, registry=registry
        )
        self.cache_hits = Counter(name("cache_hits"), "Queries answered from the cache.", ["part"], registry=registry)
        self.cache_misses = Counter(name("cache_misses"), "Queries that had to be computed.", ["part"], registry=registry)
        self.web_requests = Counter(
            name("web_requests"),
            "Requests to the search provider, by HTTP status or what went wrong.",
            ["provider", "status"],
            registry=registry,
        )
        self.web_pages = Counter(
            name("web_pages"), "Pages fetched; all but `ok` were replaced by their snippets.", ["outcome"], registry=registry
        )
        self._depth = Gauge(name("queue_depth"), "Queries waiting.", ["part"], registry=registry)
        self._passages = Gauge(name("passages"), "Passages of the corpus; 0 while loading.", registry=registry)

    def watch_depth(self, part: str, depth: Callable[[], float]) -> None:
        """Read it whenever someone asks."""
        self._depth.labels(part).set_function(depth)

    def watch_passages(self, passages: Callable[[], float]) -> None:
        self._passages.set_function(passages)

    def text(self) -> bytes:
        return generate_latest(self.registry)
