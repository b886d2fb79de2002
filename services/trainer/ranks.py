"""One rank leads: it alone talks to Redis and writes files. What it decides, every rank learns, errors included."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from typing import TypeVar

import torch.distributed as dist

T = TypeVar("T")


class StopRequested(Exception):
    """SIGTERM or Ctrl-C arrived: save what was learned and leave."""


class StopFlag:
    """Set by SIGTERM or Ctrl-C; looked at wherever the lead waits and between steps."""

    def __init__(self) -> None:
        self._event = threading.Event()

    def install(self) -> None:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: self._event.set())

    def check(self) -> None:
        if self._event.is_set():
            raise StopRequested


def is_lead() -> bool:
    return dist.get_rank() == 0


def on_lead(work: Callable[[], T]) -> T:
    """Run `work` on the lead and return its result on every rank; raise its error on every rank."""
    if dist.get_world_size() == 1:
        return work()
    outcome: list = [None, None]
    if is_lead():
        try:
            outcome[0] = work()
        except Exception as error:  # noqa: BLE001 - the other ranks must not be left waiting
            outcome[1] = error
    dist.broadcast_object_list(outcome, src=0)
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]
