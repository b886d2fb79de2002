"""Small tools of the event loop: blocking work in threads, work that must not be left half-done."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

T = TypeVar("T")

RunInThread = Callable[..., Awaitable[Any]]
"""`await run(function, *arguments)`: for Redis and files, which would block the event loop."""


def run_in(pool: ThreadPoolExecutor) -> RunInThread:
    def run(function: Any, *arguments: Any) -> asyncio.Future[Any]:
        return asyncio.get_running_loop().run_in_executor(pool, functools.partial(function, *arguments))

    return run


async def to_the_end(work: Awaitable[T]) -> T:
    """Await what must not be left half-done: a cancellation is passed on only once `work` is over."""
    task = asyncio.ensure_future(work)
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        await asyncio.wait([task])
        raise
