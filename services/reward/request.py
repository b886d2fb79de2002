"""How the worker's own process sees a message that a process of its pool is working on."""

from __future__ import annotations

from typing import Any

from billiard.exceptions import WorkerLostError
from celery.worker.request import Request


class CountedRequest(Request):
    """Counts the tries whose process died, which could not count them itself; and lets a failed acknowledgement be noticed: the
    consumer then connects anew, and the broker delivers again.

    Celery logs such a failure and goes on. The message then counts as in hand for ever, and with a prefetch of one the worker
    would take no other and, not reading from the broker any more, would not even see that the connection is gone.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options | {"connection_errors": ()})

    def on_timeout(self, soft: bool, timeout: float) -> None:
        if not soft:
            self.task.metrics.count_failure("hard_time_limit")
        super().on_timeout(soft, timeout)

    def on_failure(self, exc_info: Any, send_failed_event: bool = True, return_ok: bool = False) -> None:
        if isinstance(getattr(exc_info.exception, "exc", exc_info.exception), WorkerLostError):  # mostly wrapped with its traceback
            self.task.metrics.count_failure("process_lost")
        super().on_failure(exc_info, send_failed_event, return_ok)
