"""Where a run's Redis is, for commands that look at a run from outside; and a client that does not keep a person waiting.

| who says so                                     | when                                            |
|-------------------------------------------------|-------------------------------------------------|
| `FORAGE_REDIS__URL`                             | it is set (as in every container of the suite)  |
| `<run folder>/suite/redis.url`                  | `forage up` is running the suite here; it picks a free port |
| `redis.url` of the configuration                | otherwise                                       |
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import urlsplit

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from services.contract.config import Config

ANSWER_S = 3.0
"""Seconds that Redis may take for one command before it counts as away."""


def address_file(config: Config) -> Path:
    return config.run.folder / "suite" / "redis.url"


def with_address(config: Config, environment: Mapping[str, str] | None = None) -> Config:
    """The configuration with the `redis.url` of the table above."""
    environment = os.environ if environment is None else environment
    if "FORAGE_REDIS__URL" in environment:
        return config
    try:
        url = address_file(config).read_text().strip()
    except OSError:
        return config
    return config.model_copy(update={"redis": config.redis.model_copy(update={"url": url})}) if url else config


def hasty_client(config: Config, database: int | None = None) -> redis.Redis:
    """A client that fails at once; bytes in, bytes out. `database`: another one on the same server."""
    password = config.redis.password.get_secret_value() if config.redis.password else None
    url = config.redis.url if database is None else urlsplit(config.redis.url)._replace(path=f"/{database}").geturl()
    limits = {"socket_timeout": ANSWER_S, "socket_connect_timeout": ANSWER_S, "retry": Retry(NoBackoff(), 0)}
    return redis.Redis.from_url(url, password=password, **limits)  # type: ignore[arg-type]


def problem_in_words(config: Config, error: Exception) -> str:
    """What to tell a person about a Redis that did not answer as it should."""
    if isinstance(error, redis.AuthenticationError):
        return f"Redis at {config.redis.url} refuses the login ({error}): is FORAGE_REDIS__PASSWORD right?"
    if isinstance(error, redis.BusyLoadingError):
        return f"Redis at {config.redis.url} is reading its data back; it answers when it is done"
    if isinstance(error, (redis.ConnectionError, redis.TimeoutError, OSError)):
        return f"Redis at {config.redis.url} cannot be reached: is the suite running? ({str(error).rstrip('.')})"
    return f"Redis at {config.redis.url} answered with an error: {error}"
