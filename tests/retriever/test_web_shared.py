"""Answers are computed once, kept for a while, and given up when nobody wants them."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from services.retriever.errors import NotReady
from services.retriever.metrics import Metrics
from services.retriever.web.shared import Shared


class Work:
    """Computations that end when told to; counts them."""

    def __init__(self, size: int = 10, ttl_s: float = 60, slots: int | None = None) -> None:
        self.begun: list[str] = []
        self.cancelled: list[str] = []
        self.gate = asyncio.Event()
        self.error: Exception | None = None
        self.metrics = Metrics()
        self.shared: Shared[str, str] = Shared("web", self._compute, size, ttl_s, self.metrics, slots)

    async def _compute(self, key: str) -> str:
        self.begun.append(key)
        try:
            await self.gate.wait()
        except asyncio.CancelledError:
            self.cancelled.append(key)
            raise
        if self.error:
            raise self.error
        return key.upper()

    async def start(self, *keys: str) -> list[asyncio.Task[str]]:
        """Waiters that have come as far as they can."""
        tasks = [asyncio.create_task(self.shared.get(key)) for key in keys]
        await settle()
        return tasks

    def count(self, name: str) -> Any:
        return self.metrics.registry.get_sample_value(f"forage_retriever_{name}_total", {"part": "web"})


async def settle() -> None:
    for _ in range(10):
        await asyncio.sleep(0)


async def test_all_who_want_the_same_share_one_computation() -> None:
    work = Work()
    tasks = await work.start("a", "a", "b", "a")
    work.gate.set()
    assert await asyncio.gather(*tasks) == ["A", "A", "B", "A"]
    assert work.begun == ["a", "b"]
    assert (work.count("cache_hits"), work.count("cache_misses")) == (2, 2)


async def test_an_answer_is_kept() -> None:
    work = Work()
    work.gate.set()
    assert [await work.shared.get("a") for _ in range(3)] == ["A"] * 3
    assert work.begun == ["a"]
    assert work.shared.known("a")


async def test_an_answer_expires() -> None:
    work = Work(ttl_s=0.05)
    work.gate.set()
    await work.shared.get("a")
    await asyncio.sleep(0.06)
    assert not work.shared.known("a")
    await work.shared.get("a")
    assert work.begun == ["a", "a"]


async def test_nothing_is_kept_for_no_time() -> None:
    work = Work(ttl_s=0)
    work.gate.set()
    await work.shared.get("a")
    await work.shared.get("a")
    assert work.begun == ["a", "a"]


async def test_the_least_recently_used_goes_first() -> None:
    work = Work(size=2)
    work.gate.set()
    for key in ("a", "b", "a", "c"):
        await work.shared.get(key)
    assert [work.shared.known(key) for key in "abc"] == [True, False, True]


async def test_a_failure_reaches_all_who_wait_and_is_not_kept() -> None:
    work = Work()
    tasks = await work.start("a", "a")
    work.error = OSError("no")
    work.gate.set()
    assert [type(e) for e in await asyncio.gather(*tasks, return_exceptions=True)] == [OSError, OSError]
    work.error = None
    assert await work.shared.get("a") == "A"


async def test_who_leaves_does_not_end_it_for_the_others() -> None:
    work = Work()
    first, second = await work.start("a", "a")
    first.cancel()
    await settle()
    work.gate.set()
    assert await second == "A"
    assert work.cancelled == []


async def test_when_the_last_has_left_it_ends() -> None:
    work = Work()
    for task in await work.start("a", "a"):
        task.cancel()
    await settle()
    assert work.cancelled == ["a"]
    assert not work.shared.known("a")


async def test_who_comes_after_the_last_has_left_is_answered() -> None:
    work = Work()
    (task,) = await work.start("a")
    task.cancel()
    await asyncio.sleep(0)  # the waiter has left; the computation may not have ended yet
    (late,) = await work.start("a")
    work.gate.set()
    assert await late == "A"


async def test_no_more_are_computed_at_a_time_than_there_are_slots() -> None:
    work = Work(slots=2)
    tasks = await work.start("a", "b", "c")
    assert work.begun == ["a", "b"]
    work.gate.set()
    assert await asyncio.gather(*tasks) == ["A", "B", "C"]


async def test_what_is_paid_for_is_kept_though_nobody_waits() -> None:
    work = Work(slots=1)
    for task in await work.start("a", "b"):
        task.cancel()
    work.gate.set()
    await settle()
    assert (work.begun, work.cancelled) == (["a"], [])
    assert (work.shared.known("a"), work.shared.known("b")) == (True, False)


async def test_the_end_is_told_to_all() -> None:
    work = Work(slots=1)
    tasks = await work.start("a", "b", "b")
    work.shared.end(NotReady("over"))
    for task in tasks:
        with pytest.raises(NotReady):
            await task
    await settle()
    assert (work.begun, work.cancelled) == (["a"], ["a"])
