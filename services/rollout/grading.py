"""Asks for trajectories to be graded, and waits out a Redis that is away."""

from __future__ import annotations

import time

from kombu.exceptions import OperationalError

from services.contract.config import Config
from services.contract.grading import grading_app, send_for_grading
from services.contract.store import AWAY, RedisAway

PAUSE_S = 0.5


class Grading:
    """Safe to use from many threads."""

    def __init__(self, config: Config) -> None:
        self._app, self._patience_s = grading_app(config), config.redis.retry_s

    def request(self, trajectory_ids: list[str]) -> None:
        """Asking twice does no harm. Raises RedisAway after `redis.retry_s`."""
        started = time.monotonic()
        while True:
            try:
                return send_for_grading(self._app, *trajectory_ids)
            except (OperationalError, *AWAY) as error:
                if time.monotonic() - started > self._patience_s:
                    raise RedisAway(f"the queue of the graders has been away for {self._patience_s:.0f} s: {error}") from error
                time.sleep(PAUSE_S)
