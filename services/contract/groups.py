"""The durable path of a group: fed, leased, stored, graded, collected, released. Each move is one atomic script.

| state     | who moves it on                          | if that one dies here                                                  |
|-----------|------------------------------------------|------------------------------------------------------------------------|
| fed       | a worker reads it (`lease`)              | it waits in the stream                                                 |
| leased    | the worker refreshes it (`refresh`)      | idle for `lease_s`: another worker claims it, plays the missing samples |
| stored    | `store`, once per trajectory             | a second attempt finds it there and is discarded; one that comes after |
|           |                                          | its group was handed on, buried or released is refused                 |
| finished  | `finish`, when every sample is stored    | the lease runs out; the claimer finds all stored and finishes          |
| graded    | `grade`, once per trajectory             | Celery delivers the task again; the second time changes nothing        |
| collected | the trainer read it, nothing is acknowledged | a new trainer reads its pending entries again                      |
| released  | `release`, after the checkpoint is durable | done again; releasing twice changes nothing                          |
| dead      | `fail` beyond `max_attempts`             | a trainer that dies with the letter in hand: a new one feeds it again  |
| dead      | `GradingTries.bury`: one of its samples cannot be graded | Celery delivers again, or the sweep asks again          |

A finished group leaves by `collected` or, when one of its samples can never be graded, by `dead`: it is never waited for in vain.
A group that is still being played is not buried by a grader; the sweep asks again once it is finished.

The accounts of all of them are in accounts.py.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import msgspec
import redis

from services.contract import group_scripts as scripts
from services.contract.accounts import Accounts, count_groups
from services.contract.messages import (
    DeadLetter,
    GradedNotice,
    PromptGroup,
    Reward,
    Trajectory,
    decode_dead,
    decode_group,
    encode,
    read_trajectory,
)
from services.contract.store import Keys

T = TypeVar("T")

ROLLOUT_GROUP, TRAINER_GROUP, TRAINER = "rollout", "trainer", "trainer"
EVENTS_KEPT = 2000


class Lease(msgspec.Struct, frozen=True):
    """A group in a worker's hands; `entry_id` is its place in the prompts stream."""

    entry_id: bytes
    group: PromptGroup
    worker: str


class Graded(msgspec.Struct, frozen=True):
    entry_id: bytes
    notice: GradedNotice


class GroupStore:
    """All moves of a group. Safe to use from many threads and processes; every method may be repeated."""

    def __init__(self, client: redis.Redis, run: str) -> None:
        self.client: Any = client  # redis-py types every answer as sync or async
        self.keys = Keys(run)
        register = client.register_script
        self._feed, self._requeue, self._finish = register(scripts.FEED), register(scripts.REQUEUE), register(scripts.FINISH)
        self._die, self._grade, self._release = register(scripts.DIE), register(scripts.GRADE), register(scripts.RELEASE)
        self._accounts, self._collect = register(scripts.ACCOUNTS), register(scripts.COLLECT)
        self._store, self._refresh = register(scripts.STORE), register(scripts.REFRESH)
        self.ensure_streams()

    def ensure_streams(self) -> None:
        """Make the streams and their consumer groups; those that are there stay as they are."""
        for stream, group in (
            (self.keys.prompts, ROLLOUT_GROUP),
            (self.keys.graded, TRAINER_GROUP),
            (self.keys.dead, TRAINER_GROUP),
        ):
            try:
                self.client.xgroup_create(stream, group, id="0", mkstream=True)
            except redis.ResponseError as error:
                if "BUSYGROUP" not in str(error):
                    raise

    # -- the trainer feeds ---------------------------------------------------------------------------------------------

    def feed(self, group: PromptGroup) -> bool:
        """Put a group on the prompts stream. False: it is already in flight, and stays as it is."""
        keys = [self.keys.states, self.keys.prompts, self.keys.counters]
        return bool(self._feed(keys, [group.group_id, encode(group)]))

    # -- a worker plays ------------------------------------------------------------------------------------------------

    def lease(self, worker: str, count: int, block_ms: int) -> list[Lease]:
        """New groups for this worker; waits up to `block_ms`."""
        reply = self._read(self.keys.prompts, ROLLOUT_GROUP, worker, ">", count, block_ms)
        return [Lease(entry_id, decode_group(fields[b"body"]), worker) for entry_id, fields in reply]

    def claim(self, worker: str, lease_s: float, count: int) -> list[Lease]:
        """Groups whose worker has shown no sign of life for `lease_s` seconds; they are this worker's now."""
        idle_ms, name = int(lease_s * 1000), self.keys.prompts
        silent = self._with_streams(lambda: self.client.xpending_range(name, ROLLOUT_GROUP, "-", "+", count, idle=idle_ms))
        if not silent:
            return []
        # XCLAIM looks at the idle time once more, so two that saw the same entry do not both get it.
        entries = self.client.xclaim(name, ROLLOUT_GROUP, worker, idle_ms, [entry["message_id"] for entry in silent])
        return [Lease(entry_id, decode_group(fields[b"body"]), worker) for entry_id, fields in entries if fields]

    def refresh(self, worker: str, leases: list[Lease]) -> set[bytes]:
        """Say that these groups are still being played. Returns the entry ids that are still this worker's."""
        if not leases:
            return set()
        return set(self._refresh([self.keys.prompts], [ROLLOUT_GROUP, worker, *(lease.entry_id for lease in leases)]))

    def store(self, trajectory: Trajectory, lease: Lease | None = None) -> bool:
        """Keep a finished trajectory. False: another attempt was first, or the group is no longer played under `lease`.

        Any worker that has held the lease may store while the group is being played: what it has finished need not be
        played again. Without a lease nothing but the first attempt is looked at (for tools that put trajectories in place).
        """
        return self.store_many([(trajectory, lease)])[0]

    def store_many(self, played: Sequence[tuple[Trajectory, Lease | None]]) -> list[bool]:
        """`store` for each, in one command."""
        keys, arguments = [self.keys.states], []
        for trajectory, lease in played:
            keys.append(self.keys.trajectory(trajectory.id))
            arguments += [encode(trajectory), trajectory.group_id, b"fed " + lease.entry_id if lease else b""]
        return [bool(stored) for stored in self._store(keys, arguments)]

    def missing_samples(self, group: PromptGroup) -> list[int]:
        """Which samples of the group have no stored trajectory yet."""
        bodies = self.client.mget([self.keys.trajectory(i) for i in group.trajectory_ids()])
        return [sample for sample, body in enumerate(bodies) if body is None]

    def finish(self, lease: Lease) -> bool:
        """Every sample is stored: give up the lease. False: it was not this worker's any more, or the trainer has the group."""
        group = lease.group
        arguments = [ROLLOUT_GROUP, lease.entry_id, lease.worker, group.group_id, group.samples]
        return bool(self._finish([self.keys.prompts, self.keys.states], arguments))

    def hand_back(self, lease: Lease) -> bool:
        """Put the group back for another worker, without counting an attempt."""
        return self._put_back(lease, lease.group)

    def fail(self, lease: Lease, reason: str, max_attempts: int) -> bool:
        """Infrastructure failed under this group: try again, or bury it. Returns whether it was buried."""
        group = lease.group
        if group.attempt < max_attempts:
            again = msgspec.structs.replace(group, attempt=group.attempt + 1)
            self._put_back(lease, again)
            return False
        return self.bury(lease, reason)

    def _put_back(self, lease: Lease, group: PromptGroup) -> bool:
        arguments = [ROLLOUT_GROUP, lease.entry_id, lease.worker, encode(group), group.group_id]
        return bool(self._requeue([self.keys.prompts, self.keys.states], arguments))

    def bury(self, lease: Lease, reason: str) -> bool:
        """Move the group to `dead`, with its reason; what it had stored is deleted."""
        group, keys = lease.group, self.keys
        letter = DeadLetter(group.group_id, group.purpose, reason, group.attempt)
        names = [keys.prompts, keys.states, keys.dead, keys.counters, keys.graded_samples]
        names += self._bodies(group.trajectory_ids())
        return bool(self._die(names, [ROLLOUT_GROUP, lease.entry_id, lease.worker, group.group_id, encode(letter)]))

    # -- the grader ----------------------------------------------------------------------------------------------------

    def load(self, trajectory_id: str) -> Trajectory | None:
        """The stored trajectory; None when it was released or never stored."""
        return self.load_many([trajectory_id])[0]

    def grade(self, trajectory_id: str, body: bytes, reward: Reward) -> bool:
        """Put the reward beside the body that earned it and announce it. False: it was graded before, or is gone."""
        group_id, keys = trajectory_id.rpartition("/")[0], self.keys
        notice = GradedNotice(trajectory_id, group_id, reward.total)
        names = [keys.trajectory(trajectory_id), keys.reward(trajectory_id)]
        names += [keys.graded, keys.graded_samples, keys.grading(trajectory_id)]
        digest = hashlib.sha1(body, usedforsecurity=False).hexdigest()
        return bool(self._grade(names, [digest, encode(reward), encode(notice), group_id]))

    def ungraded(self) -> list[str]:
        """Ids of stored trajectories without a reward in groups that their workers have finished."""
        states, graded = self.client.hgetall(self.keys.states), self.client.hgetall(self.keys.graded_samples)
        names: list[str] = []
        for group_id, state in states.items():
            samples = int(state.split()[1]) if state.startswith(b"finished") else 0
            if int(graded.get(group_id, 0)) < samples:
                names += [f"{group_id.decode()}/{sample}" for sample in range(samples)]
        rewards = self.client.mget([self.keys.reward(i) for i in names]) if names else []
        waiting = [name for name, reward in zip(names, rewards, strict=True) if reward is None]
        stored = self.client.pipeline(transaction=False)
        for name in waiting:
            stored.exists(self.keys.trajectory(name))
        return [name for name, there in zip(waiting, stored.execute(), strict=True) if there]

    # -- the trainer collects ------------------------------------------------------------------------------------------

    def read_graded(self, count: int, block_ms: int | None, pending_after: bytes | None = None) -> list[Graded]:
        """Graded trajectories, unacknowledged. `pending_after`: those a former trainer had read, after that entry id."""
        start = ">" if pending_after is None else pending_after
        entries = self._read(self.keys.graded, TRAINER_GROUP, TRAINER, start, count, block_ms)
        decode = msgspec.msgpack.Decoder(GradedNotice).decode
        return [Graded(entry_id, decode(fields[b"body"])) for entry_id, fields in entries if fields]

    def read_dead(self, count: int = 100) -> list[DeadLetter]:
        """Groups that were given up since the last call."""
        entries = self._read(self.keys.dead, TRAINER_GROUP, TRAINER, ">", count, None)
        if entries:
            self.client.xack(self.keys.dead, TRAINER_GROUP, *[entry_id for entry_id, _ in entries])
        return [decode_dead(fields[b"body"]) for _, fields in entries]

    def load_many(self, trajectory_ids: list[str]) -> list[Trajectory | None]:
        """The stored trajectories with their rewards; None for what was released or never stored."""
        found = self.client.mget(self._bodies(trajectory_ids)) if trajectory_ids else []
        return [read_trajectory(body, reward) if body else None for body, reward in zip(found[::2], found[1::2], strict=True)]

    def mark_collected(self, group_id: str) -> None:
        """The trainer has read the whole group."""
        self._collect([self.keys.states, self.keys.prompts], [ROLLOUT_GROUP, group_id])

    def release(self, group_id: str, trajectory_ids: list[str], entry_ids: list[bytes]) -> bool:
        """Forget a group: its notices are acknowledged, its bodies deleted. Only after the checkpoint is durable."""
        keys = [self.keys.states, self.keys.counters, self.keys.graded, self.keys.graded_samples, self.keys.prompts]
        keys += self._bodies(trajectory_ids)
        return bool(self._release(keys, [TRAINER_GROUP, group_id, ROLLOUT_GROUP, *entry_ids]))

    def in_flight(self) -> set[str]:
        """Ids of all groups that were fed and neither released nor buried."""
        return {group_id.decode() for group_id in self.client.hkeys(self.keys.states)}

    # -- accounting and news -------------------------------------------------------------------------------------------

    def accounts(self) -> Accounts:
        """Where every group is, read in one instant."""
        keys = [self.keys.states, self.keys.prompts, self.keys.counters, self.keys.graded_samples]
        return count_groups(self._with_streams(lambda: self._accounts(keys, [ROLLOUT_GROUP])))

    def announce(self, event: str) -> None:
        """A human-readable line for `events`, which keeps the last few thousand."""
        self.client.xadd(self.keys.events, {"event": event}, maxlen=EVENTS_KEPT, approximate=True)

    def _bodies(self, trajectory_ids: list[str]) -> list[str]:
        """The keys of each one's body and reward, in turns."""
        return [name(i) for i in trajectory_ids for name in (self.keys.trajectory, self.keys.reward)]

    def _read(self, stream: str, group: str, consumer: str, start: str | bytes, count: int, block_ms: int | None) -> list:
        def read() -> list:
            return self.client.xreadgroup(group, consumer, {stream: start}, count=count, block=block_ms) or []

        reply = self._with_streams(read)
        return reply[0][1] if reply else []

    def _with_streams(self, command: Callable[[], T]) -> T:
        """Run a stream command; if Redis lost the streams, make them and run it again."""
        try:
            return command()
        except redis.ResponseError as error:
            if "NOGROUP" not in str(error):
                raise
            self.ensure_streams()
            return command()
