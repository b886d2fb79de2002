"""The lease loop: takes groups, plays their missing samples, stores each trajectory once, asks for it to be graded.

| what happens to a group here             | what this worker does with it                                            |
|------------------------------------------|--------------------------------------------------------------------------|
| every sample is stored                   | asks again for all to be graded, then `finish`                           |
| a sample failed for want of infrastructure | lets the others finish and stores them, then `fail`: again, or dead    |
| it is late (`group_deadline_s`)          | breaks off what is being played; what is stored stays. Then `fail`, or   |
|                                          | with `late_groups = "release"` and two samples stored: the missing ones  |
|                                          | are stored as failed, then `finish`                                      |
| anything else went wrong                 | `bury` at once, with the reason                                          |
| its policy version cannot be loaded here | `hand_back`                                                              |
| another worker has claimed it            | drops it without a word to Redis                                         |
| SIGTERM, and the grace period is over    | `hand_back`; what is stored stays                                        |
| this worker dies                         | nothing; the lease runs out and another worker plays what is missing     |

A group is taken only while the engines have room for an episode (`concurrency.py`) and serve the current policy version, and it
is played only by engines that serve the version that the group was issued for, or a later one.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import time

from services.contract.config import RolloutConfig
from services.contract.groups import Lease
from services.contract.messages import PromptGroup, Trajectory
from services.contract.store import RedisAway
from services.rollout.engines import EnginePool
from services.rollout.episode import Player, play_episode
from services.rollout.failures import EngineError, InfrastructureError
from services.rollout.keeper import Keeper
from services.rollout.statistics import Statistics
from services.rollout.tasks import RunInThread, to_the_end
from services.rollout.tokens import prompt_ids

logger = logging.getLogger("worker")

BLOCK_MS = 500
IDLE_S = 0.1
LEAST_OF_A_GROUP = 2
"""Samples that a late group must have to be of use to a learner: with one there is nothing to compare."""
GOODBYE_S = 5.0
"""Time to hand groups back; a Redis that is away must not hold up the shutdown."""


@dataclasses.dataclass
class Playing:
    lease: Lease
    task: asyncio.Task[None]
    unfinished: int
    """Samples that still need a seat or have one: the others leave room for the next group."""


class Worker:
    """Plays groups until `drain`, on all of its engines."""

    def __init__(
        self,
        name: str,
        config: RolloutConfig,
        keeper: Keeper,
        player: Player,
        engines: EnginePool,
        run: RunInThread,
    ) -> None:
        """`player` is what all episodes share; its `generate` is replaced by that of each episode's seat at an engine."""
        self.name, self.config, self.store, self.keeper, self.player = name, config, keeper.store, keeper, player
        self.engines, self._run = engines, run
        self.statistics = Statistics()
        self._playing: dict[bytes, Playing] = {}
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
        unfinished = sum(playing.unfinished for playing in self._playing.values())
        return self.engines.caught_up and unfinished < self.engines.room

    async def _abandoned(self) -> list[Lease]:
        """A group of a silent worker, looked for a few times per lease period, and at once again while there are more."""
        if time.monotonic() < self._claim_at:
            return []
        claimed = await self._run(self.store.claim, self.name, self.config.lease_s, 1)
        if not claimed:
            self._claim_at = time.monotonic() + min(self.config.lease_s / 4, 5.0)
        fresh = [lease for lease in claimed if lease.entry_id not in self._playing]  # our own, if a refresh came too late
        for lease in fresh:
            event = f"group {lease.group.group_id} taken over from a silent worker by {self.name}"
            logger.info(event)
            await self._run(self.store.announce, event)
        return fresh

    def _begin(self, lease: Lease) -> None:
        task = asyncio.create_task(self._play_group(lease), name=lease.group.group_id)
        self._playing[lease.entry_id] = Playing(lease, task, lease.group.samples)
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
                ended = self.store.finish if await self._play_samples(lease) else self.store.hand_back
            await to_the_end(self._run(ended, lease))
        except InfrastructureError as error:
            await self._fail(lease, str(error))
        except RedisAway:
            raise
        except TimeoutError:  # this one's own: engine and retriever turn theirs into InfrastructureError
            await self._late(lease)
        except Exception as error:  # one group that cannot be played must not end the worker
            logger.debug("group %s", group.group_id, exc_info=True)
            await self._bury(lease, f"{type(error).__name__}: {error}")

    async def _play_samples(self, lease: Lease) -> bool:
        """Play what is not stored yet. False: no engine can be brought to the group's policy version for now."""
        group = lease.group
        missing = await self._run(self.store.missing_samples, group)
        self._playing[lease.entry_id].unfinished = len(missing)
        stored = [name for sample, name in enumerate(group.trajectory_ids()) if sample not in missing]
        if stored:  # its worker may have died before it could ask
            await self._run(self.keeper.grading.request, stored)
        if not missing:
            return True
        if not await self.engines.can_play(group.issued_version):
            return False
        ids = prompt_ids(group, self.player.codec, self.player.context)
        failures: list[InfrastructureError] = []
        try:
            async with asyncio.TaskGroup() as tasks:
                for sample in missing:
                    tasks.create_task(self._play_sample(lease, sample, ids, failures))
        except ExceptionGroup as errors:
            raise errors.exceptions[0] from None
        if failures:
            raise failures[0]
        return True

    async def _play_sample(self, lease: Lease, sample: int, ids: list[int], failures: list[InfrastructureError]) -> None:
        """One episode, stored and sent for grading. A failing infrastructure is noted; the group's other samples go on."""
        group = lease.group
        async with self.engines.seat(group.issued_version) as seat:
            try:
                trajectory = await play_episode(group, sample, ids, self.player._replace(generate=seat.generate))
                if trajectory.status == "aborted":
                    raise EngineError("the engine broke off a turn")
            except InfrastructureError as error:
                failures.append(error)
                return
            finally:
                self._playing[lease.entry_id].unfinished -= 1
        trajectory.worker, trajectory.engine = self.name, seat.member.name
        await to_the_end(self.keeper.keep(trajectory, lease))
        self.statistics.count(trajectory)

    async def _late(self, lease: Lease) -> None:
        """The group's deadline has passed."""
        group = lease.group
        reason = f"deadline: not finished within {group.deadline_s:.0f} s of being taken"
        if self.config.late_groups == "retry" or (short := await to_the_end(self._run(self._release_short, lease))) is None:
            await self._fail(lease, reason)
            return
        event = f"group {group.group_id} goes on with {short} of {group.samples} samples; {reason}"
        logger.warning(event)
        await self._run(self.store.announce, event)

    def _release_short(self, lease: Lease) -> int | None:
        """In a thread. How many samples the group is finished with; None: too few, or it is not ours any more."""
        group = lease.group
        missing = self.store.missing_samples(group)
        if (stored := group.samples - len(missing)) < LEAST_OF_A_GROUP:
            return None
        ids = prompt_ids(group, self.player.codec, self.player.context)
        self.keeper.keep_now([(failed_sample(group, sample, ids), lease) for sample in missing])
        return stored if self.store.finish(lease) else None

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


def failed_sample(group: PromptGroup, sample: int, ids: list[int]) -> Trajectory:
    """What stands for a sample that was not there in time: no token after the prompt `ids`, so nothing in it to train on."""
    return Trajectory(
        id=f"{group.group_id}/{sample}",
        group_id=group.group_id,
        prompt_ids=ids,
        response_ids=[],
        logprobs=[],
        spans=[],
        status="failed",
        stop_reason="late",
        temperature=group.sampling.temperature,
        question=group.question,
        source=group.source,
        golden_answers=group.golden_answers,
        attempt=group.attempt,
    )
