"""What Prometheus reads on /metrics. One registry an app, so that two apps in a process do not add up."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)


class Metrics:
    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        name = "forage_retriever_{}".format
        self.requests = Counter(name("requests"), "Answers of /retrieve by HTTP status.", ["status"], registry=registry)
        self.errors = Counter(name("errors"), "Requests that got no passages, by reason.", ["reason"], registry=registry)
        self.queries = Counter(name("queries"), "Queries answered with passages.", registry=registry)
        self.request_seconds = Histogram(
            name("request_seconds"), "Seconds from request to answer.", buckets=SECONDS, registry=registry
        )
        self.batch_size = Histogram(name("batch_size"), "Queries encoded together.", buckets=SIZES, registry=registry)
        self.stage_seconds = {
            stage: Histogram(name(f"{stage}_seconds"), f"Seconds to {stage} one batch.", buckets=SECONDS, registry=registry)
            for stage in ("encode", "search")
        }
        self.cache_hits = Counter(name("cache_hits"), "Queries answered from the cache.", registry=registry)
        self.cache_misses = Counter(name("cache_misses"), "Queries that had to be searched.", registry=registry)
        self._depth = Gauge(name("queue_depth"), "Queries waiting.", registry=registry)
        self._passages = Gauge(name("passages"), "Passages served; 0 while loading.", registry=registry)

    def watch(self, depth: Callable[[], float], passages: Callable[[], float]) -> None:
        """Read these whenever someone asks."""
        self._depth.set_function(depth)
        self._passages.set_function(passages)

    def text(self) -> bytes:
        return generate_latest(self.registry)
