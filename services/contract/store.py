"""The connection to Redis and the names of everything in it. All keys start ``forage:{run}:``.

A Redis that is away is waited for (``redis.retry_s``), with one line when it goes and one when it is back. Commands may
then run twice, so whatever is not idempotent by nature is a Lua script that checks before it acts.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any, TypeVar
from urllib.parse import quote, urlsplit, urlunsplit

import redis
from redis.backoff import NoBackoff
from redis.exceptions import AuthenticationError, BusyLoadingError, ReadOnlyError
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import TimeoutError as RedisTimeoutError
from redis.retry import Retry

from services.contract.config import Config, RedisConfig

logger = logging.getLogger("redis")

T = TypeVar("T")
AWAY = (RedisConnectionError, RedisTimeoutError, BusyLoadingError, ReadOnlyError, ConnectionError, TimeoutError, OSError)
PAUSE_S = 0.5
SILENCE_S = 30
"""A Redis that answers a command by nothing for so long is connected to anew. A blocking read must ask for less."""


class RedisAway(Exception):
    """Redis could not be reached for `redis.retry_s` seconds."""


class PatientRetry(Retry):
    """Repeats a command until it goes through or `patience_s` has passed."""

    def __init__(self, url: str, patience_s: float) -> None:
        super().__init__(NoBackoff(), -1, supported_errors=AWAY)
        self._url, self._patience_s = url, patience_s

    def call_with_retry(  # the signature is redis-py's
        self,
        do: Callable[[], T],
        fail: Callable[..., Any],
        is_retryable: Callable[[Exception], bool] | None = None,
        with_failure_count: bool = False,
    ) -> T:
        started, failures = 0.0, 0
        while True:
            try:
                result = do()
            except AWAY as error:
                if isinstance(error, AuthenticationError) or (is_retryable and not is_retryable(error)):
                    raise
                failures += 1
                started = started or self._announce(error)
                fail(error, failures) if with_failure_count else fail(error)
                if time.monotonic() - started > self._patience_s:
                    raise RedisAway(f"Redis at {self._url} has been away for {self._patience_s:.0f} s: {error}") from error
                time.sleep(PAUSE_S)
            else:
                if failures:
                    logger.info("Redis is back after %.0f s", time.monotonic() - started)
                return result

    def _announce(self, error: BaseException) -> float:
        logger.warning("Redis at %s cannot be reached (%s): waiting up to %.0f s", self._url, error, self._patience_s)
        return time.monotonic()


def connect(config: RedisConfig) -> redis.Redis:
    """A client of the trajectory plane's database; bytes in, bytes out. Thread-safe."""
    password = config.password.get_secret_value() if config.password else None
    return redis.Redis.from_url(
        config.url,
        password=password,
        retry=PatientRetry(_without_password(config.url), config.retry_s),
        socket_timeout=SILENCE_S,
        socket_connect_timeout=5,
        health_check_interval=15,
        max_connections=256,
    )


def broker_url(config: Config) -> str:
    """The URL of Celery's own database on the same server, password included."""
    parts = urlsplit(config.redis.url)
    host = parts.netloc.rpartition("@")[2]
    password = config.redis.password.get_secret_value() if config.redis.password else parts.password
    login = f":{quote(password, safe='')}@" if password else ""
    return urlunsplit((parts.scheme, f"{login}{host}", f"/{config.reward.database}", "", ""))


def _without_password(url: str) -> str:
    scheme, _, rest = url.partition("://")
    return f"{scheme}://{rest.rpartition('@')[2]}"


class Keys:
    """Every key of one run."""

    def __init__(self, run: str) -> None:
        self.prefix = f"forage:{run}:"
        self.prompts = self.prefix + "prompts"
        self.graded = self.prefix + "graded"
        self.dead = self.prefix + "dead"
        self.states = self.prefix + "states"
        self.counters = self.prefix + "counters"
        self.graded_samples = self.prefix + "graded_samples"
        self.engines = self.prefix + "engines"
        self.policy = self.prefix + "policy"
        self.push_lease = self.prefix + "push_lease"
        self.paused_engines = self.prefix + "paused_engines"
        self.events = self.prefix + "events"

    def trajectory(self, trajectory_id: str) -> str:
        return f"{self.prefix}trajectory:{trajectory_id}"

    def reward(self, trajectory_id: str) -> str:
        """What it earned; absent until it is graded."""
        return f"{self.prefix}reward:{trajectory_id}"

    def grading(self, trajectory_id: str) -> str:
        """How often its grading was begun, and why the last try failed."""
        return f"{self.prefix}grading:{trajectory_id}"

    def engine_alive(self, engine_id: str) -> str:
        return f"{self.prefix}engine_alive:{engine_id}"

    def engine_hold(self, url: str) -> str:
        return f"{self.prefix}engine_hold:{url}"
