"""Graded trajectories become whole groups. Nothing read here is acknowledged: that is `release`, after a durable checkpoint.

What a former trainer had read and not released is read again first. Groups are handed out whole, in the order of their ids,
so that the same trajectories make the same batch. A group that was given up (`dead`) is reported instead of waited for.
"""

from __future__ import annotations

import logging
import time
from collections import defaultdict
from collections.abc import Callable

import msgspec

from services.contract.groups import Graded, GroupStore
from services.contract.messages import DeadLetter, Trajectory

logger = logging.getLogger("trainer")

READ_COUNT = 512
BLOCK_MS = 500
IDLE_S = 15.0


class CollectTimeout(Exception):
    """No group finished for `trainer.collect_timeout_s` seconds. The message says where the groups are."""


class CompleteGroup(msgspec.Struct, frozen=True):
    """All samples of one question, graded."""

    group_id: str
    trajectories: list[Trajectory]
    """In sample order."""
    entry_ids: list[bytes]

    @property
    def rewards(self) -> list[float]:
        """In sample order. A sample that failed (a late group was released without it) takes the mean of the others: it has
        no token to train on, and so it leaves the group's baseline as it is."""
        played = [trajectory.reward or 0.0 for trajectory in self.trajectories if trajectory.status != "failed"]
        mean = sum(played) / len(played) if played else 0.0
        return [mean if trajectory.status == "failed" else trajectory.reward or 0.0 for trajectory in self.trajectories]

    @property
    def versions(self) -> set[int]:
        """The policies that wrote its model tokens."""
        return {version for trajectory in self.trajectories for version in versions_of(trajectory)}


def versions_of(trajectory: Trajectory) -> set[int]:
    return {part.version for span in trajectory.spans for part in span.versions}


class Collector:
    """Reads the `graded` stream and keeps what it read by group."""

    def __init__(self, store: GroupStore, timeout_s: float, check_stop: Callable[[], None]) -> None:
        self.store, self.timeout_s, self.check_stop = store, timeout_s, check_stop
        self._notices: dict[str, dict[str, Graded]] = defaultdict(dict)
        self._letters: list[DeadLetter] = []
        """Of groups that nobody has asked for yet: training reads what an evaluation beside it will ask for, and the other way."""
        self._read_pending()

    def wait(
        self, size: Callable[[str], int | None], count: int, on_idle: Callable[[], object]
    ) -> tuple[list[CompleteGroup], list[DeadLetter]]:
        """`count` groups, finished or dead, of those whose `size(group_id)` says how many samples they have; None: not now.

        Whenever nothing has come for IDLE_S, entries are read again whose delivery was lost with a connection, and `on_idle` is
        called: it feeds again what a Redis that lost its last writes forgot. Raises CollectTimeout.
        """
        dead: list[DeadLetter] = []
        heard = nudged = time.monotonic()
        while True:
            ready = self._whole(size)
            if len(ready) + len(dead) >= count:
                return self._take(ready[: max(0, count - len(dead))]), dead
            self.check_stop()
            fresh, letters = self._read(size, BLOCK_MS)
            dead += letters
            now = time.monotonic()
            if fresh or letters:
                heard = nudged = now
            elif now - heard > self.timeout_s:
                raise CollectTimeout(self._report())
            elif now - nudged > IDLE_S:
                self._read_pending()
                on_idle()
                nudged = now

    def ready(self, size: Callable[[str], int | None]) -> tuple[list[CompleteGroup], list[DeadLetter]]:
        """As `wait`, but only what is there already."""
        _, letters = self._read(size, None)
        return self._take(self._whole(size)), letters

    def count(self, size: Callable[[str], int | None]) -> int:
        """How many groups that `size` knows have come whole by now."""
        while fresh := self.store.read_graded(READ_COUNT, None):
            self._keep(fresh)
        return len(self._whole(size))

    def take_dead(self, size: Callable[[str], int | None]) -> list[DeadLetter]:
        """Letters about groups that `size` knows; what had been graded of them is released. The others' letters are kept until
        somebody asks for them."""
        return self._read(size, None)[1]

    def _whole(self, size: Callable[[str], int | None]) -> list[str]:
        return sorted(g for g, notices in self._notices.items() if (n := size(g)) is not None and len(notices) >= n)

    def _read(self, size: Callable[[str], int | None], block_ms: int | None) -> tuple[list[Graded], list[DeadLetter]]:
        """(what was graded since, those of all letters that `size` asks for). What had been graded of a dead group is released."""
        fresh = self.store.read_graded(READ_COUNT, block_ms)  # first: a group's notices are older than its letter
        self._keep(fresh)
        self._letters += self.store.read_dead()
        taken = [letter for letter in self._letters if size(letter.group_id) is not None]
        self._letters = [letter for letter in self._letters if size(letter.group_id) is None]
        buried = {letter.group_id for letter in taken}
        self.discard(lambda group_id: group_id not in buried)
        return fresh, taken

    def discard(self, keep: Callable[[str], bool]) -> None:
        """Release groups that nobody will ask for: given up, of an evaluation that was over, or consumed before a crash."""
        for group_id in [g for g in self._notices if not keep(g)]:
            notices = self._notices.pop(group_id)
            self.store.release(group_id, list(notices), [n.entry_id for n in notices.values()])

    def _take(self, group_ids: list[str]) -> list[CompleteGroup]:
        return [group for group_id in group_ids if (group := self._load(group_id))]

    def _load(self, group_id: str) -> CompleteGroup | None:
        notices = self._notices.pop(group_id)
        ids = sorted(notices, key=lambda i: int(i.rpartition("/")[2]))
        trajectories = self.store.load_many(ids)
        whole = [t for t in trajectories if t is not None]
        entry_ids = [notices[i].entry_id for i in ids]
        if len(whole) < len(trajectories):
            logger.warning("group %s lost a trajectory in Redis: it will be fed again", group_id)
            self.store.release(group_id, ids, entry_ids)
            return None
        self.store.mark_collected(group_id)
        return CompleteGroup(group_id, whole, entry_ids)

    def _read_pending(self) -> None:
        after = b"0"
        while batch := self.store.read_graded(READ_COUNT, BLOCK_MS, pending_after=after):
            self._keep(batch)
            after = batch[-1].entry_id

    def _keep(self, notices: list[Graded]) -> None:
        for graded in notices:
            self._notices[graded.notice.group_id][graded.notice.trajectory_id] = graded

    def _report(self) -> str:
        return (
            f"no trajectory was graded for {self.timeout_s:.0f} s; groups: {self.store.accounts()}. "
            "Waiting groups need a rollout worker, leased ones are being played, ungraded ones need a reward worker."
        )
