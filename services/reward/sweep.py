"""Asks again for what nobody grades: a broker can lose a message whose worker dies in the instant between taking and noting it.

A trajectory of a finished group that is still ungraded at two sweeps in a row is sent again, at most once in RESEND_S; a long
queue is thus not made longer than twice its length. Grading twice changes nothing. So a trajectory that was given up while its
group was still being played comes back to the graders, who then bury the group.
"""

from __future__ import annotations

import logging
import threading
import time

import redis
from celery import Celery
from kombu.exceptions import OperationalError

from services.contract.config import Config
from services.contract.grading import send_for_grading
from services.contract.groups import GroupStore
from services.contract.store import AWAY, RedisAway, connect

logger = logging.getLogger("reward")

SWEEP_S, RESEND_S = 20.0, 120.0


class Sweep:
    def __init__(self, app: Celery, config: Config) -> None:
        self.app, self.config = app, config
        self._seen: set[str] = set()
        self._sent: dict[str, float] = {}

    def start(self) -> None:
        """Sweep in a thread for as long as this process lives."""
        threading.Thread(target=self._run, name="sweep", daemon=True).start()

    def _run(self) -> None:
        store = GroupStore(connect(self.config.redis), self.config.run.name)
        while True:
            time.sleep(SWEEP_S)
            try:
                if sent := self.sweep(store):
                    logger.warning("asked again for %d trajectories that nobody had graded", sent)
            except (RedisAway, OperationalError, redis.RedisError, *AWAY) as error:  # refused, too: this thread must live on
                logger.warning("could not look for ungraded trajectories: %s", error)

    def sweep(self, store: GroupStore) -> int:
        """One look; returns how many trajectories were sent again."""
        now, ungraded = time.monotonic(), set(store.ungraded())
        self._sent = {name: at for name, at in self._sent.items() if now - at < RESEND_S}
        overdue = sorted((ungraded & self._seen) - self._sent.keys())
        self._seen = ungraded
        send_for_grading(self.app, *overdue)
        self._sent |= dict.fromkeys(overdue, now)
        return len(overdue)
