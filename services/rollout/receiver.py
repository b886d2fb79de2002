"""One engine's part in pushes: what its worker does on the trainer's orders (`services/contract/push.py` has the table).

Whatever happens, a push ends in one of four ways, and the watcher acts on that:

| outcome   | the engine                                             | what the watcher does                                      |
|-----------|--------------------------------------------------------|------------------------------------------------------------|
| committed | holds the new version whole, and it is current         | resumes                                                    |
| unpaused  | never stopped serving                                  | nothing                                                    |
| paused    | holds the version it had; no byte of another came      | resumes                                                    |
| torn      | may hold part of each, or one that never became current| loads a whole version from the volume, then resumes        |

An engine that stays in a collective after the push is over (its trainer's host is gone without a word) cannot be spoken to any
more: that is an EngineError, and the engine is started anew.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable
from typing import Any, Literal

from services.contract.config import Config
from services.contract.policy import PolicyBoard
from services.contract.push import BucketLayout, Push, WeightGroup
from services.rollout.engine import Engine
from services.rollout.failures import EngineError
from services.rollout.tasks import RunInThread, to_the_end

logger = logging.getLogger("policy")

Outcome = Literal["committed", "unpaused", "paused", "torn"]
LOOK_S = 0.02
LET_GO_S = 10.0
"""How long an engine may take to notice that the trainer has left the group."""


class Receiver:
    def __init__(self, config: Config, board: PolicyBoard, engine: Engine, run: RunInThread) -> None:
        self.config, self.board, self.engine, self._run = config, board, engine, run
        self.report: Callable[[], Awaitable[None]] = _nothing
        self.pausing: Callable[[], Awaitable[None]] = _nothing
        """Called just before the engine is paused."""
        self.group = ""
        self.following = self.receiving = self.received = self.refused = -1
        """Versions: whose push it takes part in, that the engine waits for, that has come whole, that it could not go on with."""
        self._outcome: Outcome = "unpaused"
        self._in_collective = False
        """The engine waits for the other ranks; until it comes back it hears nothing."""

    def forget(self) -> None:
        """The engine is gone, and its ranks with it."""
        self.group, self.received = "", -1

    async def take_part(self, push: Push) -> Outcome:
        """Carry the push out on the engine, to its end. Raises EngineError when the engine is stuck in it."""
        self._outcome, self.following = "unpaused", push.version
        join, send = asyncio.Event(), asyncio.Event()
        over = asyncio.create_task(self._until_over(push.version, join, send))
        work = asyncio.create_task(self._work(push, join, send))
        try:
            await asyncio.wait({over, work}, return_when=asyncio.FIRST_COMPLETED)
            if self._in_collective:
                await asyncio.wait({work}, timeout=LET_GO_S)
            if self._in_collective:
                raise EngineError(f"the engine does not come back from the push of version {push.version}")
            if work.done() and await self._succeeded(work, push.version) and await over:
                return "committed"
            if self._outcome != "unpaused":
                logger.warning("the push of version %d failed: the engine goes back to a whole version", push.version)
            self.received = -1
            return self._outcome
        finally:
            self.following = self.receiving = -1
            for task in (over, work):
                task.cancel()
            await asyncio.gather(over, work, return_exceptions=True)

    async def _succeeded(self, work: asyncio.Task[None], version: int) -> bool:
        try:
            work.result()
        except EngineError as error:
            logger.error("the push of version %d cannot go on here: %s", version, error)
            self.refused = version
        else:
            self.received = version
        self.receiving = -1
        await self.report()
        return self.received == version

    async def _until_over(self, version: int, join: asyncio.Event, send: asyncio.Event) -> bool:
        """Look at the order until the push is over; whether its version became current. Sets the events at these orders."""
        while True:
            push = await self._run(self.board.pushes.alive)
            if push is None or push.version != version:
                current = await self._run(self.board.current)  # only now: it is committed before the lease ends
                return current is not None and current.version >= version
            if push.order != "ready":
                join.set()
            if push.order == "send":
                send.set()
            await asyncio.sleep(LOOK_S)

    async def _work(self, push: Push, join: asyncio.Event, send: asyncio.Event) -> None:
        await self.report()
        await join.wait()
        await self._join(push.group)
        await self.report()
        await send.wait()
        await self.pausing()
        self._outcome = "paused"
        await to_the_end(self.engine.pause_as(self.config.rollout.update_mode))  # or it could arrive after a resume
        with contextlib.suppress(EngineError):  # a push that failed may have left it open
            await self.engine.control("/end_weight_update", {})
        await self.engine.control("/begin_weight_update", {})
        self.receiving = push.version
        await self.report()
        self._outcome = "torn"
        for number, layout in enumerate(push.buckets, 1):
            last = number == len(push.buckets)
            await self._collective("/update_weights_from_distributed", _bucket(push, layout, last))
        await self.engine.control("/end_weight_update", {})
        await self._check(push)

    async def _join(self, group: WeightGroup) -> None:
        if self.group == group.name:
            return
        await self.leave()
        body = {
            "master_address": group.address,
            "master_port": group.port,
            "rank_offset": group.ranks[self.engine.name],
            "world_size": group.size,
            "group_name": group.name,
            "backend": group.backend,
        }
        await self._collective("/init_weights_update_group", body)
        self.group = group.name

    async def _collective(self, path: str, body: dict[str, Any]) -> None:
        self._in_collective = True
        try:
            await self.engine.control(path, body)
        finally:
            self._in_collective = False

    async def leave(self) -> None:
        """Let the engine forget its group; its trainer has, or will."""
        name, self.group = self.group, ""
        if name:
            with contextlib.suppress(EngineError):
                await self.engine.control("/destroy_weights_update_group", {"group_name": name})

    async def _check(self, push: Push) -> None:
        """The engine must say that it serves the version and, where the trainer knows them, have its checksums."""
        if (reported := await self.engine.reported_version()) != str(push.version):
            raise EngineError(f"the engine reports version {reported} after the push of version {push.version}")
        engine = self.config.rollout.engine
        if push.checksums and engine.tensor_parallel == 1 and engine.dtype == self.config.weights.dtype:
            answer = await self.engine.control("/weights_checker", {"action": "checksum"})
            found = answer["ranks"][0]["checksums"]
            if wrong := [name for name, checksum in push.checksums.items() if found.get(name) != checksum]:
                raise EngineError(f"{len(wrong)} of {len(push.checksums)} tensors came otherwise than they were sent: {wrong[:3]}")


def _bucket(push: Push, layout: BucketLayout, last: bool) -> dict[str, Any]:
    """The request that makes an engine receive a bucket. Only the last one names the version and drops the cached KV."""
    body = {
        "names": layout.names,
        "dtypes": layout.dtypes,
        "shapes": layout.shapes,
        "group_name": push.group.name,
        "load_format": "flattened_bucket",
        "flush_cache": last,
    }
    return body | ({"weight_version": str(push.version)} if last else {})


async def _nothing() -> None:
    pass
