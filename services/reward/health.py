"""The health of a grading worker. The event loop writes its heartbeat, which stops when the loop, pool or broker does.

Three ways to be unwell, all seen by the health check:
* not connected: the file's text begins with "starting";
* the loop hangs: the file grows old;
* the pool hangs: a message has been in hand for longer than two hard time limits, and the file is left to grow old.
"""

from __future__ import annotations

import contextlib
import logging
import time
from typing import Any

from celery import bootsteps
from celery.worker import state

from services.contract.telemetry import Heartbeat

logger = logging.getLogger("reward")
BEAT_S = 1.0
STARTING = "starting: not connected to the broker yet"


class HeartbeatStep(bootsteps.StartStopStep):
    """Runs whenever the consumer is connected, and says so when it is not any more."""

    requires = {"celery.worker.consumer.tasks:Tasks"}

    def __init__(self, consumer: Any, **options: Any) -> None:
        super().__init__(consumer, **options)
        self.heartbeat = Heartbeat.from_environment()
        self.patience_s = 2 * consumer.app.conf.task_time_limit
        self.held_since: dict[str, float] = {}
        self.timer: Any = None
        self.connected_before = False

    def start(self, parent: Any) -> None:
        queue, at = parent.app.conf.task_default_queue, parent.connection
        broker = f"redis://{at.hostname}:{at.port}/{at.virtual_host}"
        if self.connected_before:
            logger.info("connected to the broker again")
        else:
            logger.info("ready: %d process(es) take tasks from %s at %s", parent.pool.limit, queue, broker)
        self.connected_before = True
        self.timer = parent.timer.call_repeatedly(BEAT_S, self.beat)
        self.beat()

    def stop(self, parent: Any) -> None:
        if self.timer:
            self.timer.cancel()
        self.heartbeat.beat(STARTING)

    def beat(self) -> None:
        if self.longest_held(time.monotonic()) <= self.patience_s:
            with contextlib.suppress(OSError):  # raised into the event loop it would look like a lost connection
                self.heartbeat.beat(f"ready: {state.all_total_count[0]} tasks taken")

    def longest_held(self, now: float) -> float:
        """Seconds for which the oldest unfinished message has been in this worker's hands."""
        held = {request.id for request in state.reserved_requests}
        self.held_since = {task: self.held_since.get(task, now) for task in held}
        return max((now - since for since in self.held_since.values()), default=0.0)
