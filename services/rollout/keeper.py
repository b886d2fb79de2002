"""Finished episodes go to Redis together: while one batch is on its way, the next one gathers.

A single episode waits for nobody. The busier the worker, the larger the batches, and the fewer the commands, the syncs of Redis's
file and the hops between threads for each.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from services.contract.groups import GroupStore, Lease
from services.contract.messages import Trajectory
from services.rollout.grading import Grading
from services.rollout.tasks import RunInThread

LARGEST = 32
"""Trajectories in one command: Redis serves nobody else meanwhile."""

Played = tuple[Trajectory, Lease]


class Keeper:
    """Stores trajectories and asks for their grading."""

    def __init__(self, store: GroupStore, grading: Grading, run: RunInThread) -> None:
        self.store, self.grading, self._run = store, grading, run
        self._waiting: list[tuple[Played, asyncio.Future[None]]] = []
        self._sending: asyncio.Task[None] | None = None

    async def keep(self, trajectory: Trajectory, lease: Lease) -> None:
        """Returns once it is stored and its grading asked for. Raises RedisAway."""
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append(((trajectory, lease), done))
        if self._sending is None:
            self._sending = asyncio.create_task(self._send())
        await done

    async def _send(self) -> None:
        while batch := self._waiting[:LARGEST]:
            del self._waiting[: len(batch)]
            try:
                await self._run(self.keep_now, [played for played, _ in batch])
            except Exception as error:  # each episode of the batch is told, and its worker deals with it
                problem: Exception | None = error
            else:
                problem = None
            for _, done in batch:
                if not done.done():
                    done.set_result(None) if problem is None else done.set_exception(problem)
        self._sending = None

    def keep_now(self, played: Sequence[Played]) -> None:
        """In a thread. Stored first: a grader that finds nothing has nothing to do."""
        self.store.store_many(played)
        self.grading.request([trajectory.id for trajectory, _ in played])
