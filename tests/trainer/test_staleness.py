"""Whatever happens between feeding and learning: nothing too stale is trained, nothing is lost, nothing is trained twice."""

from __future__ import annotations

import random

import msgspec
import pytest
import redis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from services.contract.config import Config
from services.contract.groups import GroupStore, Lease
from services.contract.messages import Question
from services.trainer.durable.ledger import Ledger
from services.trainer.feeding import collect
from services.trainer.feeding.batch import Batches
from services.trainer.feeding.collect import Collector, CompleteGroup
from services.trainer.feeding.questions import TrainingOrder, training_index
from tests.factories import grade, make_trajectory

GROUPS, SAMPLES, STEPS, CHECKPOINT_EVERY = 3, 2, 5, 2


class Crash(Exception):
    """The trainer dies here."""


class World:
    """A run whose workers and crashes follow a seed: groups are played in any order, by any policy that was ever published,
    half by one and half by a later one; some are handed back, some buried; the trainer dies while it waits or before it
    acknowledges, and goes on from its last checkpoint."""

    def __init__(self, store: GroupStore, seed: int, bound: int, crashes: int) -> None:
        store.client.flushall()
        store.ensure_streams()
        self.store, self.draw, self.bound, self.crashes = store, random.Random(seed), bound, crashes
        self.held: list[Lease] = []
        self.step_of = {0: 0}
        """Policy version -> steps that its weights had learned. A crash makes the versions after the checkpoint None."""
        self.trained: list[list[str]] = []
        self.batch_staleness: list[int] = []
        self.buried = 0
        self.saved = (msgspec.json.encode(Ledger()), 0)
        self._start()

    def _start(self) -> None:
        """A trainer's start: as `Run.make_current` and `Batches.take_over` do it."""
        encoded, steps = self.saved
        self.ledger = msgspec.json.decode(encoded, type=Ledger)
        self.trained, self.unreleased = self.trained[:steps], []
        lost = [v for v, step in self.step_of.items() if v not in sum(self.ledger.lineage, []) and step is not None]
        for version in lost:
            self.step_of[version] = None if version > self.ledger.version else self.step_of[version]
        if max(self.step_of) > self.ledger.version:
            self._publish()
        trainer = {"groups_per_step": GROUPS, "samples_per_prompt": SAMPLES, "max_staleness": self.bound}
        config = Config.model_validate({"trainer": trainer})
        order = TrainingOrder([Question(str(i), "s", "q?", ["a"]) for i in range(7)], seed=0)
        self.batches = Batches(config, self.store, Collector(self.store, 20, self.tick), order, self.ledger)
        self.batches.take_over()

    def _publish(self) -> None:
        version = max(self.step_of) + 1
        self.ledger.publish(version, policies_kept=self.bound + 1)
        self.step_of[version] = self.ledger.step

    # -- what goes on while the trainer waits --------------------------------------------------------------------------

    def tick(self) -> None:
        self.held += self.store.lease("worker", self.draw.randint(1, 3), None) if self.draw.random() < 0.8 else []
        if self.crashes and self.draw.random() < 0.05:
            self.crashes -= 1
            raise Crash
        if not self.held:
            return
        lease = self.held.pop(self.draw.randrange(len(self.held)))
        what = self.draw.choices(["play", "straggle", "hand back", "bury"], [12, 4, 2, 1])[0]
        if what == "straggle":
            self.held.append(lease)
        elif what == "hand back":
            self.store.hand_back(lease)
        elif what == "bury":
            self.buried += self.store.bury(lease, "broken")
        else:
            self._play(lease)

    def _play(self, lease: Lease) -> None:
        published = sorted(self.step_of)
        for sample in range(SAMPLES):
            first = published[-1] if self.draw.random() < 0.7 else self.draw.choice(published)
            then = self.draw.choice([v for v in published if v >= first])
            self.store.store(make_trajectory(lease.group.group_id, sample, versions=(first, first, then)), lease)
            grade(self.store, f"{lease.group.group_id}/{sample}", self.draw.random())
        self.store.finish(lease)

    # -- the trainer ---------------------------------------------------------------------------------------------------

    def run(self) -> list[list[str]]:
        """Groups of each step of the run that was not lost."""
        while self.ledger.step < STEPS:
            try:
                self._step()
            except Crash:
                self._start()
        return self.trained

    def _step(self) -> None:
        groups = self.batches.next_batch()
        self._check(groups)
        self.batches.consume(groups)
        self.trained.append([group.group_id for group in groups])
        self.unreleased += groups
        self.ledger.step, self.ledger.unpublished = self.ledger.step + 1, True
        self._publish()
        if self.ledger.step % CHECKPOINT_EVERY == 0 or self.ledger.step == STEPS:
            self.saved = (msgspec.json.encode(self.ledger), self.ledger.step)
            if self.crashes and self.draw.random() < 0.3:
                self.crashes -= 1
                raise Crash
            self.batches.release(self.unreleased)
            self.unreleased.clear()

    def _check(self, groups: list[CompleteGroup]) -> None:
        names = [group.group_id for group in groups]
        assert len(groups) == GROUPS and names == sorted(set(names))
        assert all(len(group.trajectories) == SAMPLES for group in groups)
        for version in set().union(*(group.versions for group in groups)):
            learned = self.step_of[version]
            assert learned is not None, f"version {version} was lost in a crash"
            self.batch_staleness.append(self.ledger.step - learned)
        assert max(self.batch_staleness) <= self.bound


@pytest.fixture
def store(redis_client: redis.Redis, monkeypatch: pytest.MonkeyPatch) -> GroupStore:
    monkeypatch.setattr(collect, "BLOCK_MS", 1)
    return GroupStore(redis_client, "test")


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(seed=st.integers(0, 2**32), bound=st.integers(0, 3), crashes=st.integers(0, 3))
def test_any_schedule_trains_fresh_whole_groups_once_and_loses_none(store: GroupStore, seed: int, bound: int, crashes: int) -> None:
    world = World(store, seed, bound, crashes)
    steps = world.run()
    trained = [training_index(group_id) for step in steps for group_id in step]
    assert len(trained) == len(set(trained)) == STEPS * GROUPS
    consumed = {i for i in range(max(filter(None, trained)) + 1) if world.ledger.is_consumed(i)}
    assert set(trained) <= consumed and len(consumed) <= STEPS * GROUPS + world.buried, "the others were buried"
    accounts = store.accounts()
    accounts.check()
    assert accounts.released + accounts.dead + len(store.in_flight()) == accounts.fed


@pytest.mark.parametrize("bound", [0, 2])
def test_the_same_schedule_trains_the_same_groups_in_the_same_order(store: GroupStore, bound: int) -> None:
    assert World(store, 11, bound, 2).run() == World(store, 11, bound, 2).run()


def test_an_asynchronous_run_does_train_on_older_policies(store: GroupStore) -> None:
    """Else the bound above would hold for want of anything stale."""
    world = World(store, 5, 2, 0)
    world.run()
    assert max(world.batch_staleness) > 0 and world.batches.refed > 0
