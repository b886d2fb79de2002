"""Feeds training questions and cuts batches of whole groups, none staler than `max_staleness`.

Two guards bound staleness. `feed` admits a group only while fewer than (max_staleness + 1) × groups_per_step are outstanding,
so the rollout cannot run far ahead; `next_batch` checks every group when the batch is cut and feeds a stale one again.

With `objective.dynamic_sampling` (DAPO, arXiv 2503.14476) a group whose rewards are all equal is dropped, its question counts as
done, and the next one is fed in its place; after `dynamic_sampling_limit` × groups_per_step of them such groups are taken.
"""

from __future__ import annotations

import logging
from itertools import count

from services.contract.config import Config
from services.contract.groups import GroupStore
from services.trainer.collect import Collector, CompleteGroup
from services.trainer.ledger import Ledger
from services.trainer.objective.advantages import zero_variance
from services.trainer.questions import TrainingOrder, make_group, training_group_id, training_index
from services.trainer.shaping import shaped_rewards

logger = logging.getLogger("trainer")


class Batches:
    """The training side of the prompts and graded streams. Lives on the lead rank."""

    def __init__(self, config: Config, store: GroupStore, collector: Collector, order: TrainingOrder, ledger: Ledger) -> None:
        self.config, self.store, self.collector, self.order, self.ledger = config, store, collector, order, ledger
        self.refed = 0
        """Groups that came back too stale and were fed again, since the start of this process."""
        self.lost = 0
        """Groups that were given up by the rollout, since the start of this process."""
        self.dropped = 0
        """Groups without variance that dynamic sampling replaced, since the start of this process."""

    def feed(self) -> int:
        """Feed questions up to the staleness bound; returns how many groups were fed."""
        trainer = self.config.trainer
        outstanding = self._outstanding()
        room = (trainer.max_staleness + 1) * trainer.groups_per_step - len(outstanding)
        fed = 0
        for index in count(self.ledger.next_index):
            if fed >= room:
                return fed
            if index not in outstanding and not self.ledger.is_consumed(index):
                fed += self._feed_one(index)
        return fed

    def next_batch(self) -> list[CompleteGroup]:
        """`groups_per_step` complete groups within the staleness bound, in the order of their questions."""
        wanted, batch = self.config.trainer.groups_per_step, []
        may_drop = self.config.trainer.objective.dynamic_sampling_limit * wanted
        while len(batch) < wanted:
            self.feed()
            groups, dead = self.collector.wait(self._size, wanted - len(batch), on_idle=self.feed)
            for letter in dead:
                self._give_up(letter.group_id, letter.reason)
            for group in filter(self._fresh_enough, groups):
                if may_drop and self._teaches_nothing(group):
                    self._drop(group)
                    may_drop -= 1
                else:
                    batch.append(group)
        return sorted(batch, key=lambda group: group.group_id)

    def forget_consumed(self) -> None:
        """After a restart: release what the checkpoint contains but a crash kept from being acknowledged."""
        for group_id in self.store.in_flight():
            index = training_index(group_id)
            if index is not None and self.ledger.is_consumed(index):
                ids = [f"{group_id}/{sample}" for sample in range(self.config.trainer.samples_per_prompt)]
                self.store.release(group_id, ids, [])
        self.collector.discard(lambda g: (i := training_index(g)) is None or not self.ledger.is_consumed(i))

    def consume(self, groups: list[CompleteGroup]) -> None:
        """Count the questions of these groups as done, in the ledger."""
        indices = (training_index(group.group_id) for group in groups)
        self.ledger.consume([index for index in indices if index is not None])

    def figures(self) -> dict[str, float]:
        """Counts of what went astray, since this process began, and of what waits."""
        accounts = self.store.accounts()
        counts: dict[str, float] = {"groups_refed": self.refed, "groups_lost": self.lost, "groups_waiting": accounts.waiting}
        return counts | ({"groups_dropped": self.dropped} if self.config.trainer.objective.dynamic_sampling else {})

    def release(self, groups: list[CompleteGroup]) -> None:
        """Only after the checkpoint that contains them is durable."""
        for group in groups:
            self.store.release(group.group_id, [t.id for t in group.trajectories], group.entry_ids)

    def _feed_one(self, index: int) -> int:
        group = make_group(self.config, training_group_id(index), self.order[index], self.ledger.version, evaluate=False)
        return int(self.store.feed(group))

    def _fresh_enough(self, group: CompleteGroup) -> bool:
        staleness = group.staleness(self.ledger.version)
        if staleness <= self.config.trainer.max_staleness:
            return True
        logger.info("group %s is %d versions old: it is fed again", group.group_id, staleness)
        self.release([group])
        self.refed += 1
        return False  # it is outstanding no more, so the next `feed` takes its question first

    def _teaches_nothing(self, group: CompleteGroup) -> bool:
        objective = self.config.trainer.objective
        return objective.dynamic_sampling and zero_variance(shaped_rewards(group, objective))

    def _drop(self, group: CompleteGroup) -> None:
        """Nothing was learned from it, so nothing is lost if a crash forgets this: its question is then asked once more."""
        self.consume([group])
        self.release([group])
        self.dropped += 1

    def _give_up(self, group_id: str, reason: str) -> None:
        logger.warning("group %s was given up: %s", group_id, reason)
        self.lost += 1
        if (index := training_index(group_id)) is not None:
            self.ledger.consume([index])

    def _outstanding(self) -> set[int]:
        indices = (training_index(group_id) for group_id in self.store.in_flight())
        return {index for index in indices if index is not None and not self.ledger.is_consumed(index)}

    def _size(self, group_id: str) -> int | None:
        index = training_index(group_id)
        return None if index is None or self.ledger.is_consumed(index) else self.config.trainer.samples_per_prompt
