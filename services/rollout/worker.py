"""The lease loop: takes groups, plays their missing samples, stores each trajectory once, asks for it to be graded.

| what happens to a group here             | what this worker does with it                                            |
|------------------------------------------|--------------------------------------------------------------------------|
| every sample is stored                   | asks again for all to be graded, then `finish`                           |
| a sample failed for want of infrastructure | lets the others finish and stores them, then `fail`: again, or dead    |
| it is not finished within its deadline   | breaks off what is being played, then `fail`; what is stored stays       |
| anything else went wrong                 | `bury` at once, with the reason                                          |
| its policy version cannot be loaded here | `hand_back`                                                              |
| another worker has claimed it            | drops it without a word to Redis                                         |
| SIGTERM, and the grace period is over    | `hand_back`; what is stored stays                                        |
| this worker dies                         | nothing; the lease runs out and another worker plays what is missing     |

A group is taken only while an episode slot is free and the engine serves the current policy version, and it is played only
once the engine serves the version that the group was issued for.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable
from typing import NamedTuple, TypeVar

from services.contract.config import RolloutConfig
from services.contract.groups import GroupStore, Lease
from services.contract.messages import PromptGroup, Trajectory
from services.contract.store import RedisAway
from services.rollout.episode import Player, play_episode
from services.rollout.failures import EngineError, InfrastructureError
from services.rollout.grading import Grading
from services.rollout.policy_watcher import PolicyWatcher, RunInThread
from services.rollout.statistics import Statistics
from services.rollout.tokens import prompt_ids

logger = logging.getLogger("worker")

BLOCK_MS = 500
IDLE_S = 0.1
CLAIM_COUNT = 10
GOODBYE_S = 5.0
"""Time to hand groups back; a Redis that is away must not hold up the shutdown."""

T = TypeVar("T")


class Playing(NamedTuple):
    lease: Lease
    task: asyncio.Task[None]


class Worker:
    """Plays groups until `drain`. One per engine."""

    def __init__(
        self,
        name: str,
        config: RolloutConfig,
        store: GroupStore,
        grading: Grading,
        player: Player,
        watcher: PolicyWatcher,
        run: RunInThread,
    ) -> None:
        self.name, self.config, self.store, self.grading, self.player = name, config, store, grading, player
        self.watcher, self._run = watcher, run
        self.statistics = Statistics()
        self._playing: dict[bytes, Playing] = {}
        self._slots = asyncio.Semaphore(config.concurrency)
        self._claim_at = 0.0
        self._failed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        """Gets the exception that ends the worker."""

    # -- taking groups -------------------------------------------------------------------------------------------------

    async def take_groups(self, stop: asyncio.Event) -> None:
        """Until `stop` is set; not to be cancelled, or a group might be leased that nobody knows of."""
        while not stop.is_set():
            if not self._may_take():
                await asyncio.sleep(IDLE_S)
                continue
            for lease in await self._abandoned() or await self._run(self.store.lease, self.name, 1, BLOCK_MS):
                self._begin(lease)

    def _may_take(self) -> bool:
        promised = sum(playing.lease.group.samples for playing in self._playing.values())
        return self.watcher.caught_up and promised < self.config.concurrency

    async def _abandoned(self) -> list[Lease]:
        """Groups of silent workers, looked for a few times per lease period."""
        if time.monotonic() < self._claim_at:
            return []
        self._claim_at = time.monotonic() + min(self.config.lease_s / 4, 5.0)
        claimed = await self._run(self.store.claim, self.name, self.config.lease_s, CLAIM_COUNT)
        fresh = [lease for lease in claimed if lease.entry_id not in self._playing]  # our own, if a refresh came too late
        for lease in fresh:
            event = f"group {lease.group.group_id} taken over from a silent worker by {self.name}"
            logger.info(event)
            await self._run(self.store.announce, event)
        return fresh

    def _begin(self, lease: Lease) -> None:
        task = asyncio.create_task(self._play_group(lease), name=lease.group.group_id)
        self._playing[lease.entry_id] = Playing(lease, task)
        task.add_done_callback(lambda task: self._ended(lease, task))

    def _ended(self, lease: Lease, task: asyncio.Task[None]) -> None:
        self._playing.pop(lease.entry_id, None)
        if not task.cancelled() and (error := task.exception()) and not self._failed.done():
            self._failed.set_exception(error)

    async def failure(self) -> None:
        """Returns never; raises what this worker cannot go on with."""
        await asyncio.shield(self._failed)

    # -- playing a group -----------------------------------------------------------------------------------------------

    async def _play_group(self, lease: Lease) -> None:
        """Play it and tell Redis how it went: the table above."""
        group = lease.group
        try:
            async with asyncio.timeout(group.deadline_s):
                ended = self.store.finish if await self._play_samples(group) else self.store.hand_back
            await to_the_end(self._run(ended, lease))
        except InfrastructureError as error:
            await self._fail(lease, str(error))
        except RedisAway:
            raise
        except TimeoutError:  # this one's own: engine and retriever turn theirs into InfrastructureError
            await self._fail(lease, f"deadline: not finished within {group.deadline_s:.0f} s of being taken")
        except Exception as error:
            logger.debug("group %s", group.group_id, exc_info=True)
            await self._bury(lease, f"{type(error).__name__}: {error}")

    async def _play_samples(self, group: PromptGroup) -> bool:
        """Play what is not stored yet. False: the engine cannot be brought to the group's policy version for now."""
        missing = await self._run(self.store.missing_samples, group)
        stored = [name for sample, name in enumerate(group.trajectory_ids()) if sample not in missing]
        for name in stored:  # its worker may have died before it could ask
            await self._run(self.grading.request, name)
        if not missing:
            return True
        if not await self.watcher.caught_up_with(group.issued_version):
            return False
        ids = prompt_ids(group, self.player.codec, self.player.context)
        failures: list[InfrastructureError] = []
        try:
            async with asyncio.TaskGroup() as tasks:
                for sample in missing:
                    tasks.create_task(self._play_sample(group, sample, ids, failures))
        except ExceptionGroup as errors:
            raise errors.exceptions[0] from None
        if failures:
            raise failures[0]
        return True

    async def _play_sample(self, group: PromptGroup, sample: int, ids: list[int], failures: list[InfrastructureError]) -> None:
        """One episode, stored and sent for grading. A failing infrastructure is noted; the group's other samples go on."""
        async with self._slots:
            self.statistics.in_flight += 1
            try:
                trajectory = await play_episode(group, sample, ids, self.player)
                if trajectory.status == "aborted":
                    raise EngineError("the engine broke off a turn")
            except InfrastructureError as error:
                failures.append(error)
                return
            finally:
                self.statistics.in_flight -= 1
        trajectory.worker = trajectory.engine = self.name
        await to_the_end(self._run(self._keep, trajectory))
        self.statistics.count(trajectory)

    def _keep(self, trajectory: Trajectory) -> None:
        """In a thread. Stored first: a grader that finds nothing has nothing to do."""
        self.store.store(trajectory)
        self.grading.request(trajectory.id)

    async def _fail(self, lease: Lease, reason: str) -> None:
        buried = await to_the_end(self._run(self.store.fail, lease, reason, self.config.max_attempts))
        group = lease.group
        outcome = "given up" if buried else "to be tried again"
        event = f"group {group.group_id} failed, attempt {group.attempt} of {self.config.max_attempts}, {outcome}: {reason}"
        logger.warning(event)
        await self._run(self.store.announce, event)

    async def _bury(self, lease: Lease, reason: str) -> None:
        if await to_the_end(self._run(self.store.bury, lease, reason)):
            event = f"group {lease.group.group_id} given up: {reason}"
            logger.warning(event)
            await self._run(self.store.announce, event)

    # -- keeping the leases --------------------------------------------------------------------------------------------

    async def keep_leases(self) -> None:
        """Refresh them all the time; drop the groups that another worker has claimed meanwhile. Until cancelled."""
        while True:
            await asyncio.sleep(self.config.lease_s / 3)
            playing = dict(self._playing)
            held = await self._run(self.store.refresh, self.name, [p.lease for p in playing.values()])
            for entry_id in playing.keys() - held:
                if entry_id in self._playing:
                    self._playing[entry_id].task.cancel()
                    logger.warning("group %s is another worker's now, dropped", playing[entry_id].lease.group.group_id)

    async def drain(self) -> None:
        """Give running groups `shutdown_grace_s`, then hand back the rest. Call after `take_groups` has returned."""
        tasks = {playing.task for playing in self._playing.values()}
        if tasks:
            logger.info("finishing %d groups, for at most %.0f s", len(tasks), self.config.shutdown_grace_s)
            await asyncio.wait(tasks, timeout=self.config.shutdown_grace_s)
        rest = list(self._playing.values())
        for playing in rest:
            playing.task.cancel()
        await asyncio.gather(*(playing.task for playing in rest), return_exceptions=True)
        handed = [self._run(self.store.hand_back, playing.lease) for playing in rest if playing.task.cancelled()]
        if not handed:
            return
        try:
            back = await asyncio.wait_for(asyncio.gather(*handed), GOODBYE_S)
        except TimeoutError:
            logger.warning("Redis did not take %d groups back: they go to others when their leases run out", len(handed))
        else:
            logger.info("handed back %d groups", sum(back))


async def to_the_end(work: Awaitable[T]) -> T:
    """Await what must not be left half-done: a cancellation is passed on only once `work` is over."""
    task = asyncio.ensure_future(work)
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        await asyncio.wait([task])
        raise
