"""One rank leads: it alone talks to Redis and writes files. What it decides, every rank learns, errors included.

The others wait for the lead as long as it takes: an hour of rollout is no fault of the network, so what is shared here has no
`trainer.distributed_timeout_s`. A rank that dies still ends the wait, because its connections break.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from datetime import timedelta
from functools import lru_cache
from typing import Any, TypeVar

import torch.distributed as dist

T = TypeVar("T")
NO_TIMEOUT = timedelta(days=365)


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
    return _share(_outcome(work) if is_lead() else (None, None))


def on_lead_with_export(work: Callable[[Callable[[], Iterator[Any]]], object], export: Callable[[], Iterator[Any]]) -> None:
    """Run `work(begin)` on the lead; its error is raised on every rank.

    Each `begin()` is a pass of `export`, which the other ranks go through at the same time, since gathering takes all of them. A
    pass that the lead leaves early is gone through to its end before the next one, or the ranks would wait for each other.
    """
    if dist.get_world_size() == 1:
        work(export)
    elif is_lead():
        _lead_exports(work, export)
    else:
        while _share((None, None)):
            _exhaust(export())
        _share((None, None))


def _lead_exports(work: Callable[[Callable[[], Iterator[Any]]], object], export: Callable[[], Iterator[Any]]) -> None:
    begun: list[Iterator[Any]] = []

    def begin() -> Iterator[Any]:
        _exhaust(*begun)
        _share((True, None))
        begun.append(export())
        return begun[-1]

    outcome = _outcome(lambda: work(begin))
    _exhaust(*begun)
    _share((False, None))
    _share(outcome)


def _exhaust(*passes: Iterator[Any]) -> None:
    for rest in passes:
        for _ in rest:
            pass


def _outcome(work: Callable[[], T]) -> tuple[T | None, Exception | None]:
    try:
        return work(), None
    except Exception as error:  # noqa: BLE001 - the other ranks must not be left waiting
        return None, error


def _share(outcome: tuple[Any, Exception | None]) -> Any:
    """The lead's (result, error) on every rank; the error is raised."""
    group = _patient_group(dist.group.WORLD)
    shared = list(outcome)
    dist.broadcast_object_list(shared, src=0, group=group)
    if shared[1] is not None:
        raise shared[1]
    return shared[0]


@lru_cache(maxsize=1)
def _patient_group(_world: Any) -> Any:
    """gloo also beside NCCL, which would keep a GPU busy with waiting. Made at the first use, which all ranks come to together."""
    return dist.new_group(backend="gloo", timeout=NO_TIMEOUT)
