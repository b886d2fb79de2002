"""Feeds training questions and cuts batches of whole groups, none staler than `max_staleness`.

Two guards bound staleness. `feed` admits a group only while fewer than a batch and its lookahead are outstanding, at most
(max_staleness + 1) × groups_per_step (see lookahead.py), so the rollout cannot run far ahead; `next_batch` checks every group when
the batch is cut and feeds a stale one again.

| a group that does not come          | with max_staleness = 0                                 | with more                         |
|-------------------------------------|--------------------------------------------------------|-----------------------------------|
| its worker or engine died           | another plays it; the batch waits for it               | the batch is cut of others        |
| a straggler                         | waited for until its deadline (rollout/worker.py)      | the batch is cut of others, but   |
|                                     |                                                        | for the last one; if it comes too |
|                                     |                                                        | stale, it is fed again            |
| given up (`dead`), counted as lost  | the next question is fed in its place                  | the same                          |
| nobody plays or grades at all       | after `collect_timeout_s` the run stops and says where | the same                          |
|                                     | the groups are; the next start goes on                 |                                   |

With `objective.dynamic_sampling` (DAPO, arXiv 2503.14476) a group whose rewards are all equal is dropped, its question counts as
done, and the next one is fed in its place; after `dynamic_sampling_limit` × groups_per_step of them such groups are taken.
"""

from __future__ import annotations

import logging
from itertools import count

from services.contract.config import Config
from services.contract.groups import GroupStore
from services.contract.messages import DeadLetter
from services.trainer.durable.ledger import Ledger
from services.trainer.feeding.collect import Collector, CompleteGroup
from services.trainer.feeding.lookahead import Lookahead
from services.trainer.feeding.questions import TrainingOrder, make_group, training_group_id, training_index
from services.trainer.objective.advantages import zero_variance
from services.trainer.shaping import shaped_rewards

logger = logging.getLogger("trainer")

CHANGED = (
    "the training questions, data.mix, run.seed or samples_per_prompt have changed since the last checkpoint: what was in flight "
    "is fed again; question number %d and those after it are counted in the new order, so some may be asked again in this epoch "
    "and others not"
)


class Batches:
    """The training side of the prompts and graded streams. Lives on the lead rank."""

    def __init__(self, config: Config, store: GroupStore, collector: Collector, order: TrainingOrder, ledger: Ledger) -> None:
        self.config, self.store, self.collector, self.order, self.ledger = config, store, collector, order, ledger
        self.lookahead = Lookahead(config.trainer.groups_per_step, config.trainer.max_staleness)
        self._cut: set[str] = set()
        """Groups of the batch that is being put together: a Redis that lost its last writes may announce them again."""
        self.refed = 0
        """Groups that came back too stale and were fed again, since the start of this process."""
        self.lost = 0
        """Groups that were given up by the rollout, since the start of this process."""
        self.dropped = 0
        """Groups without variance that dynamic sampling replaced, since the start of this process."""

    def feed(self) -> int:
        """Feed questions for a batch and those to be played ahead, if steps are left for them; returns how many groups were fed."""
        trainer, outstanding = self.config.trainer, self._outstanding()
        still_to_train = (trainer.steps - self.ledger.step) * trainer.groups_per_step
        room = min(trainer.groups_per_step + self.lookahead.groups, still_to_train) - len(outstanding)
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
        self._cut.clear()
        self._give_up_dead(self.collector.take_dead(self._size))
        may_drop = self.config.trainer.objective.dynamic_sampling_limit * wanted
        was_fed_ahead = len(self._outstanding()) >= self.lookahead.groups  # not after a cold start, nor just after a raise
        missing = 0
        while len(batch) < wanted:
            missing += max(0, wanted - len(batch) - self.collector.count(self._size))
            self.feed()
            groups, dead = self.collector.wait(self._size, wanted - len(batch), on_idle=self.feed)
            self._give_up_dead(dead)
            for group in filter(self._fresh_enough, groups):
                if may_drop and self._teaches_nothing(group):
                    self._drop(group)
                    may_drop -= 1
                else:
                    batch.append(group)
                    self._cut.add(group.group_id)
        if was_fed_ahead:
            self.lookahead.note(missing, spare=self.collector.count(self._size))
        return sorted(batch, key=lambda group: group.group_id)

    def take_over(self) -> None:
        """After a restart: release what the checkpoint contains but a crash kept from being acknowledged, and what was fed
        from other questions or with another number of samples than the run has now."""
        samples = max(self.ledger.samples, self.config.trainer.samples_per_prompt)
        changed = self.ledger.count_in(self.order.fingerprint, self.config.trainer.samples_per_prompt)
        if changed:
            logger.warning(CHANGED, self.ledger.next_index)
        for group_id in self.store.in_flight():
            index = training_index(group_id)
            if index is not None and (changed or self.ledger.is_consumed(index)):
                self._forget(group_id, samples)
        self.collector.discard(lambda g: training_index(g) is None or not (changed or self._is_consumed(g)))

    def consume(self, groups: list[CompleteGroup]) -> None:
        """Count the questions of these groups as done, in the ledger."""
        indices = (training_index(group.group_id) for group in groups)
        self.ledger.consume([index for index in indices if index is not None])

    def figures(self) -> dict[str, float]:
        """Counts of groups: those that went astray, since this process began; those that wait; the lookahead."""
        accounts = self.store.accounts()
        counts: dict[str, float] = {"groups_refed": self.refed, "groups_lost": self.lost, "groups_waiting": accounts.waiting}
        counts["lookahead"] = self.lookahead.groups
        return counts | ({"groups_dropped": self.dropped} if self.config.trainer.objective.dynamic_sampling else {})

    def release(self, groups: list[CompleteGroup]) -> None:
        """Only after the checkpoint that contains them is durable."""
        for group in groups:
            self.store.release(group.group_id, [t.id for t in group.trajectories], group.entry_ids)
        self.collector.discard(lambda group_id: not self._is_consumed(group_id))

    def _feed_one(self, index: int) -> int:
        group = make_group(self.config, training_group_id(index), self.order[index], self.ledger.version, evaluate=False)
        return int(self.store.feed(group))

    def _fresh_enough(self, group: CompleteGroup) -> bool:
        staleness = self.ledger.staleness(group.versions)
        if staleness is not None and staleness <= self.config.trainer.max_staleness:
            return True
        oldest, now = min(group.versions), self.ledger.version
        logger.info("group %s was played by version %d, now it is %d: it is fed again", group.group_id, oldest, now)
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

    def _give_up_dead(self, dead: list[DeadLetter]) -> None:
        for letter in dead:
            logger.warning("group %s was given up: %s", letter.group_id, letter.reason)
            self.lost += 1
            if (index := training_index(letter.group_id)) is not None:
                self.ledger.consume([index])
            self._forget(letter.group_id, self.ledger.samples)  # if it was fed again before its letter was read

    def _forget(self, group_id: str, samples: int) -> None:
        """Release a group that this process has not collected."""
        self.store.release(group_id, [f"{group_id}/{sample}" for sample in range(samples)], [])

    def _is_consumed(self, group_id: str) -> bool:
        return (index := training_index(group_id)) is not None and self.ledger.is_consumed(index)

    def _outstanding(self) -> set[int]:
        indices = (training_index(group_id) for group_id in self.store.in_flight())
        return {index for index in indices if index is not None and not self.ledger.is_consumed(index)}

    def _size(self, group_id: str) -> int | None:
        index = training_index(group_id)
        if index is None or group_id in self._cut or self.ledger.is_consumed(index):
            return None
        return self.config.trainer.samples_per_prompt
