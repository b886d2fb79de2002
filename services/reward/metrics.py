"""What Prometheus reads on /metrics of a grading worker: the sum over its processes, those that were killed included.

The processes of the pool share nothing with their parent but files, so this is prometheus_client's multiprocess mode. It is
switched on by an environment variable that the library reads when it is first imported: see `__main__`.
"""

from __future__ import annotations

import os
from typing import Literal

from prometheus_client import CollectorRegistry, Counter, Histogram, start_http_server
from prometheus_client.multiprocess import MultiProcessCollector

from services.contract.config import ConfigError, RewardConfig

FOLDER_VARIABLE = "PROMETHEUS_MULTIPROC_DIR"
SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
REWARDS = (0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1, 2)

Outcome = Literal["graded", "graded_before", "gone", "requeued", "buried", "left", "dropped"]
"""What became of a message; `left`: given up while its group was still being played, the sweep comes back to it."""
Failure = Literal["error", "soft_time_limit", "hard_time_limit", "process_lost", "unreadable", "ungradable", "redis_away"]


class Metrics:
    """One registry an instance, so that two in a process do not add up."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        name = "forage_reward_{}".format
        self._outcomes = Counter(name("messages"), "Messages dealt with, by what became of them.", ["outcome"], registry=registry)
        self._failures = Counter(name("failures"), "Tries to grade that failed, by reason.", ["reason"], registry=registry)
        self._seconds = Histogram(name("grade_seconds"), "Seconds from message to outcome.", buckets=SECONDS, registry=registry)
        self._rewards = Histogram(
            name("value"), "Rewards given, by kind of question.", ["source"], buckets=REWARDS, registry=registry
        )

    def count(self, outcome: Outcome, seconds: float) -> None:
        self._outcomes.labels(outcome).inc()
        self._seconds.observe(seconds)

    def count_failure(self, reason: Failure) -> None:
        self._failures.labels(reason).inc()

    def count_reward(self, source: str, reward: float) -> None:
        self._rewards.labels(source).observe(reward)


def serve_metrics(config: RewardConfig) -> None:
    """Answer on `reward.metrics_port` in a thread. Does nothing when that is 0. Raises ConfigError when it is taken."""
    if not config.metrics_port:
        return
    registry = CollectorRegistry()
    MultiProcessCollector(registry, os.environ[FOLDER_VARIABLE])
    try:
        start_http_server(config.metrics_port, config.metrics_host, registry)
    except OSError as error:
        where = f"{config.metrics_host}:{config.metrics_port}"
        raise ConfigError(f"cannot listen on {where} ({error}): set reward.metrics_port to a free port, or 0 for none") from None
