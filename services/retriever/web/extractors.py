"""The processes that find the passages of pages (`extract.py`): started when first needed, killed when a page takes too long."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from asyncio.subprocess import PIPE, Process
from collections.abc import Coroutine
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from services.retriever.web import extract
from services.retriever.web.extract import LENGTH, Task

START_S = 60
"""To import trafilatura, on a machine that is busy with other things."""
ROOT = Path(__file__).parents[3]


PASSED_ON = ("PATH", "LD_LIBRARY_PATH", "PYTHONPATH", "LANG")


def environment() -> dict[str, str]:
    """What Python needs to start, and not the provider's key."""
    return {name: os.environ[name] for name in PASSED_ON if name in os.environ}


class ExtractionFailed(Exception):
    """The process died over the page, as it does when the page needs too much memory; or `timeout` passed."""

    def __init__(self, timeout: bool) -> None:
        super().__init__("too slow" if timeout else "the process died")
        self.timeout = timeout


class Extractors:
    def __init__(self, count: int, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self._idle: asyncio.LifoQueue[Process | None] = asyncio.LifoQueue()
        """None stands for a process that is not started, or was killed."""
        self._started: set[Process] = set()
        for _ in range(count):
            self._idle.put_nowait(None)

    async def passage(self, page: bytes, task: Task) -> str:
        """Empty if the page has no text. Raises ExtractionFailed."""
        process = await self._idle.get()
        healthy = False
        try:
            process = process or await self._start()
            text = await self._ask(process, page, task)
            healthy = True
            return text
        finally:  # also when nobody waits any more: an answer half read would be taken for the next page's
            if process and not healthy:
                self._kill(process)
            self._idle.put_nowait(process if healthy else None)

    async def close(self) -> None:
        for process in self._started:
            self._kill(process)
        await asyncio.gather(*(process.wait() for process in self._started))

    async def _start(self) -> Process:
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", extract.__name__, stdin=PIPE, stdout=PIPE, cwd=ROOT, env=environment()
        )
        self._started = {old for old in self._started if old.returncode is None} | {process}
        try:
            await self._within(START_S, _receive(process))
        except BaseException:
            self._kill(process)
            raise
        return process

    async def _ask(self, process: Process, page: bytes, task: Task) -> str:
        content = json.dumps(asdict(task)).encode() + b"\0" + page
        return (await self._within(self._timeout_s, _exchange(process, LENGTH.pack(len(content)) + content))).decode()

    async def _within(self, seconds: float, answer: Coroutine[Any, Any, bytes]) -> bytes:
        try:
            return await asyncio.wait_for(answer, seconds)
        except TimeoutError:
            raise ExtractionFailed(timeout=True) from None
        except (asyncio.IncompleteReadError, ConnectionError, RuntimeError):  # the last is uvloop's word for a closed pipe
            raise ExtractionFailed(timeout=False) from None

    def _kill(self, process: Process) -> None:
        with suppress(ProcessLookupError):
            process.kill()


async def _exchange(process: Process, frame: bytes) -> bytes:
    assert process.stdin is not None
    process.stdin.write(frame)
    await process.stdin.drain()
    return await _receive(process)


async def _receive(process: Process) -> bytes:
    assert process.stdout is not None
    (length,) = LENGTH.unpack(await process.stdout.readexactly(LENGTH.size))
    return await process.stdout.readexactly(length)
