"""Answers by key: each computed once however many want it at the same time, and kept for a while.

| the key is        | `get` waits for                  | when all who wait have gone                          |
|-------------------|----------------------------------|------------------------------------------------------|
| kept, not expired | nothing                          |                                                      |
| in flight         | the flight under way             | cancelled, unless it holds one of the `slots`        |
| neither           | a new flight                     | the same                                             |

A failure reaches all who wait for it and is not kept. All of it runs on one event loop.
"""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Hashable
from dataclasses import dataclass
from typing import Generic, TypeVar

from services.retriever.metrics import Metrics

K = TypeVar("K", bound=Hashable)
A = TypeVar("A")


@dataclass(eq=False)
class Flight(Generic[A]):
    """One computation under way."""

    future: asyncio.Future[A]
    task: asyncio.Task[None] | None = None
    waiting: int = 0
    begun: bool = False
    """Holds a slot: it costs money by now, so it is seen through and kept even when nobody waits any more."""


class Shared(Generic[K, A]):
    def __init__(
        self, name: str, compute: Callable[[K], Awaitable[A]], size: int, ttl_s: float, metrics: Metrics, slots: int | None = None
    ) -> None:
        """`slots`: computations at a time; None for no limit. `name`: the `part` that hits and misses are counted for."""
        self._compute, self._size, self._ttl_s = compute, size, ttl_s
        self._hits, self._misses = metrics.cache_hits.labels(name), metrics.cache_misses.labels(name)
        self._slots = asyncio.Semaphore(slots) if slots else None
        self._kept: OrderedDict[K, tuple[float, A]] = OrderedDict()
        """With the time, by `time.monotonic`, until which it holds."""
        self._flights: dict[K, Flight[A]] = {}

    def known(self, key: K) -> bool:
        """Whether `get` starts nothing new."""
        return key in self._flights or self._fresh(key) is not None

    async def get(self, key: K) -> A:
        """Raises what the computation raised."""
        if (kept := self._fresh(key)) is not None:
            self._kept.move_to_end(key)
            self._hits.inc()
            return kept[1]
        (self._hits if key in self._flights else self._misses).inc()
        flight = self._flights.get(key) or self._depart(key)
        flight.waiting += 1
        try:
            return await asyncio.shield(flight.future)
        finally:
            flight.waiting -= 1
            if not (flight.waiting or flight.begun or flight.future.done()):
                self._drop(key, flight)

    def end(self, error: Exception) -> None:
        """Whoever waits gets `error`; what is under way is cancelled."""
        for key, flight in list(self._flights.items()):
            _fail(flight, error)
            self._drop(key, flight)

    def _drop(self, key: K, flight: Flight[A]) -> None:
        if self._flights.get(key) is flight:
            del self._flights[key]  # at once: who comes before the task has ended needs a flight of his own
        if flight.task:
            flight.task.cancel()

    def _fresh(self, key: K) -> tuple[float, A] | None:
        kept = self._kept.get(key)
        if kept is not None and kept[0] < time.monotonic():
            del self._kept[key]
            return None
        return kept

    def _depart(self, key: K) -> Flight[A]:
        flight = self._flights[key] = Flight(asyncio.get_running_loop().create_future())
        flight.task = asyncio.create_task(self._fly(key, flight))
        return flight

    async def _fly(self, key: K, flight: Flight[A]) -> None:
        try:
            answer = await self._compute_in_turn(key, flight)
        except Exception as error:  # whatever it is, those who wait must hear of it
            _fail(flight, error)
        else:
            self._keep(key, answer)
            if not flight.future.done():
                flight.future.set_result(answer)
        finally:
            flight.future.cancel()
            if self._flights.get(key) is flight:
                del self._flights[key]

    async def _compute_in_turn(self, key: K, flight: Flight[A]) -> A:
        if self._slots is None:
            return await self._compute(key)
        async with self._slots:
            flight.begun = True
            return await self._compute(key)

    def _keep(self, key: K, answer: A) -> None:
        if self._ttl_s:
            self._kept[key] = (time.monotonic() + self._ttl_s, answer)
        while len(self._kept) > self._size:
            self._kept.popitem(last=False)


def _fail(flight: Flight, error: Exception) -> None:
    if not flight.future.done():
        flight.future.set_exception(error)
        flight.future.exception()  # nobody may be waiting: that is no error to warn of
