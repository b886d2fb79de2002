"""The life of a group, move by move, against a real Redis: each row of the table in services/contract/groups.py."""

from __future__ import annotations

import threading

import pytest
import redis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from services.contract.config import RedisConfig
from services.contract.grading_tries import GradingTries
from services.contract.groups import GroupStore
from services.contract.messages import Reward
from services.contract.store import RedisAway, connect
from tests.conftest import RedisServer
from tests.factories import grade, make_group, make_trajectory


@pytest.fixture
def store(redis_client: redis.Redis) -> GroupStore:
    return GroupStore(redis_client, "test")


def play(store: GroupStore, group_id: str = "t0", samples: int = 2) -> None:
    """Feed, lease, store and finish one group."""
    store.feed(make_group(group_id, samples))
    (lease,) = store.lease("worker", 1, 10)
    for sample in range(samples):
        store.store(make_trajectory(group_id, sample))
    assert store.finish(lease)


def test_feeding_a_group_twice_leaves_one(store: GroupStore) -> None:
    assert store.feed(make_group())
    assert not store.feed(make_group())
    assert store.accounts().waiting == 1


def test_a_lease_goes_to_one_worker_only(store: GroupStore) -> None:
    store.feed(make_group())
    assert len(store.lease("a", 5, 10)) == 1
    assert store.lease("b", 5, 10) == []
    assert store.accounts().leased == 1


def test_a_silent_worker_loses_its_group_and_a_refreshing_one_keeps_it(store: GroupStore) -> None:
    store.feed(make_group("t0"))
    store.feed(make_group("t1"))
    first, second = store.lease("a", 2, 10)
    deadline = threading.Event()
    for _ in range(4):
        deadline.wait(0.1)
        assert store.refresh("a", [second]) == {second.entry_id}
    claimed = store.claim("b", lease_s=0.3, count=5)
    assert [lease.group.group_id for lease in claimed] == [first.group.group_id]
    assert store.refresh("a", [first, second]) == {second.entry_id}


def test_the_first_stored_attempt_wins(store: GroupStore) -> None:
    assert store.store(make_trajectory(answer="Paris"))
    assert not store.store(make_trajectory(answer="Rome"))
    assert store.load("t0/0").answer == "Paris"


@pytest.mark.parametrize("moved_on", ["finish", "hand_back", "fail", "bury", "release"])
def test_a_trajectory_that_comes_after_its_group_has_moved_on_is_refused(store: GroupStore, moved_on: str) -> None:
    store.feed(make_group(samples=1))
    (lost,) = store.lease("slow", 1, 10)
    (lease,) = store.claim("quick", lease_s=0, count=1)
    moves = {"fail": lambda: store.fail(lease, "x", 3), "bury": lambda: store.bury(lease, "x")}
    moves["release"] = lambda: store.release("t0", ["t0/0"], [])
    moves.get(moved_on, lambda: getattr(store, moved_on)(lease))()
    assert not store.store(make_trajectory(), lost)
    assert store.load("t0/0") is None


def test_what_a_former_holder_has_finished_counts_while_the_group_is_played(store: GroupStore) -> None:
    store.feed(make_group(samples=2))
    (lost,) = store.lease("slow", 1, 10)
    (lease,) = store.claim("quick", lease_s=0, count=1)
    assert store.store(make_trajectory(), lost)
    assert store.missing_samples(lease.group) == [1]


def test_an_abandoned_group_behind_many_living_ones_is_found(store: GroupStore) -> None:
    for index in range(60):
        store.feed(make_group(f"t{index}"))
    living, (abandoned,) = store.lease("a", 59, 10), store.lease("b", 1, 10)
    threading.Event().wait(0.4)
    assert len(store.refresh("a", living)) == 59
    assert [lease.entry_id for lease in store.claim("c", lease_s=0.3, count=1)] == [abandoned.entry_id]
    assert store.claim("c", lease_s=0.3, count=1) == []


def test_missing_samples_are_those_not_stored(store: GroupStore) -> None:
    group = make_group(samples=4)
    store.store(make_trajectory(sample=2))
    assert store.missing_samples(group) == [0, 1, 3]


def test_grading_twice_announces_once(store: GroupStore) -> None:
    store.store(make_trajectory())
    assert grade(store, "t0/0", 1.0, exact_match=1.0)
    assert not grade(store, "t0/0", 0.0)
    assert [g.notice.reward for g in store.read_graded(10, 10)] == [1.0]
    assert store.load("t0/0").reward_parts == {"exact_match": 1.0}


def test_a_finished_group_with_a_sample_that_cannot_be_graded_is_buried_with_its_reason(store: GroupStore) -> None:
    play(store)
    grade(store, "t0/0")
    tries = GradingTries(store.client, "test")
    attempt = tries.begin("t0/1", 3)
    assert attempt and tries.bury(attempt, "no such judge", 3)
    (letter,) = store.read_dead()
    assert (letter.group_id, letter.reason, letter.attempts) == ("t0", "no such judge", 3)
    assert store.load("t0/0") is None and not store.client.keys("*grading:*")
    assert (store.accounts().dead, store.accounts().finished) == (1, 0)
    assert store.feed(make_group()), "a buried group may be fed again"


def test_tries_to_grade_are_counted_until_there_are_none_left_and_forgotten_with_a_grade(store: GroupStore) -> None:
    store.store(make_trajectory())
    tries = GradingTries(store.client, "test")
    begun = [tries.begin("t0/0", 2) for _ in range(2)]
    tries.note(begun[1], "no such judge")
    begun += [tries.begin("t0/0", 2) for _ in range(2)]
    assert [(b.number, b.last_reason) for b in begun] == [(1, ""), (2, ""), (3, "no such judge"), (3, "no such judge")]
    assert store.client.ttl(store.keys.grading("t0/0")) > 3600, "what is never graded is forgotten some day"
    grade(store, "t0/0")
    assert not store.client.keys("*grading:*")
    assert tries.begin("t0/0", 2) == "graded_before"
    assert tries.begin("nobody/0", 2) == "gone"


def test_grading_what_was_released_does_nothing(store: GroupStore) -> None:
    play(store)
    body = store.client.get(store.keys.trajectory("t0/0"))
    store.release("t0", ["t0/0", "t0/1"], [])
    assert not store.grade("t0/0", body, Reward(1.0, {}))
    assert store.load("t0/0") is None


def test_the_reward_of_a_former_life_is_not_given_to_a_group_that_was_fed_again(store: GroupStore) -> None:
    play(store)
    body = store.client.get(store.keys.trajectory("t0/0"))
    store.release("t0", ["t0/0", "t0/1"], [])
    store.feed(make_group())
    store.store(make_trajectory(answer="Lyon"))
    assert not store.grade("t0/0", body, Reward(1.0, {}))
    assert store.load("t0/0").reward is None


def test_a_group_is_tried_again_then_buried_with_its_reason(store: GroupStore) -> None:
    store.feed(make_group())
    attempts = []
    for _ in range(3):
        (lease,) = store.lease("a", 1, 10)
        attempts.append(lease.group.attempt)
        buried = store.fail(lease, "the retriever answers 500", max_attempts=3)
    assert attempts == [1, 2, 3] and buried
    (letter,) = store.read_dead()
    assert (letter.group_id, letter.reason, letter.attempts) == ("t0", "the retriever answers 500", 3)
    assert store.accounts().dead == 1
    assert store.feed(make_group()), "a buried group may be fed again"


@pytest.mark.parametrize("finished", [True, False])
def test_a_worker_that_lost_its_lease_cannot_move_the_group(store: GroupStore, finished: bool) -> None:
    store.feed(make_group())
    (lost,) = store.lease("a", 1, 10)
    (lease,) = store.claim("b", lease_s=0, count=1)
    assert not finished or store.finish(lease)
    assert not store.finish(lost) and not store.hand_back(lost) and not store.bury(lost, "late")
    store.fail(lost, "late", max_attempts=3)
    accounts = store.accounts()
    assert (accounts.finished, accounts.leased, accounts.waiting) == ((1, 0, 0) if finished else (0, 1, 0))


def test_a_refresh_does_not_take_back_what_another_has_claimed(store: GroupStore) -> None:
    store.feed(make_group())
    (lost,) = store.lease("a", 1, 10)
    (lease,) = store.claim("b", lease_s=0, count=1)
    assert store.refresh("a", [lost]) == set()
    assert store.finish(lease)


def test_an_unacknowledged_notice_is_read_again_by_the_next_trainer(store: GroupStore) -> None:
    play(store)
    grade(store, "t0/0")
    (notice,) = store.read_graded(10, 10)
    assert store.read_graded(10, 10) == []
    assert store.read_graded(10, 10, pending_after=b"0") == [notice]
    store.release("t0", ["t0/0", "t0/1"], [notice.entry_id])
    assert store.read_graded(10, 10, pending_after=b"0") == []


def test_releasing_twice_counts_once_and_leaves_no_key(store: GroupStore) -> None:
    play(store)
    assert store.release("t0", ["t0/0", "t0/1"], [])
    assert not store.release("t0", ["t0/0", "t0/1"], [])
    assert store.accounts().released == 1
    assert not list(store.client.keys("*t0/*"))


@pytest.mark.parametrize("collected", [True, False])
def test_a_group_released_before_its_worker_finishes_stays_released(store: GroupStore, collected: bool) -> None:
    store.feed(make_group(samples=1))
    (lease,) = store.lease("worker", 1, 10)
    store.store(make_trajectory())
    grade(store, "t0/0")
    if collected:
        store.mark_collected("t0")
        store.accounts().check()
    store.release("t0", ["t0/0"], [])
    assert not store.finish(lease)
    assert store.in_flight() == set()
    store.accounts().check()


def test_streams_lost_with_redis_are_made_again(store: GroupStore) -> None:
    store.client.flushall()
    assert store.lease("a", 1, 10) == []
    assert store.feed(make_group())
    assert len(store.lease("a", 1, 10)) == 1


def test_a_redis_that_comes_back_in_time_is_waited_for(tmp_path) -> None:
    server = RedisServer(tmp_path)
    server.start()
    store = GroupStore(connect(RedisConfig(url=server.url, retry_s=20)), "test")
    store.feed(make_group())
    server.kill()
    comeback = threading.Timer(1.5, server.start)
    comeback.start()
    assert store.accounts().fed == 1, "the append-only file kept the group"
    comeback.join()
    server.kill()


def test_a_redis_that_stays_away_is_one_clear_error() -> None:
    with pytest.raises(RedisAway, match="has been away for 1 s"):
        connect(RedisConfig(url="redis://127.0.0.1:1/0", retry_s=1)).ping()


class Accounting(RuleBasedStateMachine):
    """Any order of moves, by several workers, keeps every group accounted for."""

    store: GroupStore

    @initialize()
    def begin(self) -> None:
        self.store.client.flushall()
        self.store.ensure_streams()
        self.fed, self.leases, self.notices = 0, [], []

    @rule(samples=st.integers(1, 3))
    def feed(self, samples: int) -> None:
        self.store.feed(make_group(f"t{self.fed}", samples))
        self.fed += 1

    @rule(worker=st.sampled_from("ab"))
    def lease(self, worker: str) -> None:
        self.leases += self.store.lease(worker, 1, None)

    @rule(worker=st.sampled_from("ab"))
    def claim(self, worker: str) -> None:
        self.leases += self.store.claim(worker, 0, 1)

    @rule(pick=st.integers(0, 9))
    def play_a_sample(self, pick: int) -> None:
        if self.leases:
            lease = self.leases[pick % len(self.leases)]
            group = lease.group
            for sample in self.store.missing_samples(group)[:1]:
                self.store.store(make_trajectory(group.group_id, sample), lease)

    @rule(pick=st.integers(0, 9))
    def finish(self, pick: int) -> None:
        if self.leases:
            lease = self.leases[pick % len(self.leases)]
            if not self.store.missing_samples(lease.group):
                self.store.finish(lease)

    @rule(pick=st.integers(0, 9), how=st.sampled_from(["fail", "hand_back"]))
    def give_up(self, pick: int, how: str) -> None:
        if self.leases:
            lease = self.leases[pick % len(self.leases)]
            self.store.fail(lease, "x", 2) if how == "fail" else self.store.hand_back(lease)

    @rule()
    def grade(self) -> None:
        for key in self.store.client.keys("*trajectory*"):
            trajectory = self.store.load(key.decode().split("trajectory:")[1])
            if trajectory.reward is None:
                grade(self.store, trajectory.id)
                return

    @rule(pick=st.integers(0, 9))
    def give_up_grading(self, pick: int) -> None:
        tries, keys = GradingTries(self.store.client, "test"), sorted(self.store.client.keys("*trajectory*"))
        if keys:
            attempt = tries.begin(keys[pick % len(keys)].decode().split("trajectory:")[1], 3)
            assert attempt != "gone"
            if attempt != "graded_before":
                tries.bury(attempt, "x", attempt.number)

    @rule()
    def collect_and_release(self) -> None:
        self.notices += self.store.read_graded(50, None)
        for lease in self.leases:
            ids = lease.group.trajectory_ids()
            mine = [n for n in self.notices if n.notice.group_id == lease.group.group_id]
            if len(mine) == len(ids) and not self.store.missing_samples(lease.group):
                self.store.release(lease.group.group_id, ids, [n.entry_id for n in mine])
                return

    @invariant()
    def every_group_is_somewhere(self) -> None:
        accounts = self.store.accounts()
        accounts.check()
        assert accounts.fed == self.fed

    @invariant()
    def every_trajectory_belongs_to_a_group_in_flight(self) -> None:
        groups = {key.decode().split("trajectory:")[1].split("/")[0] for key in self.store.client.keys("*trajectory*")}
        assert groups <= self.store.in_flight()


def test_every_group_is_accounted_for_under_any_order_of_moves(store: GroupStore) -> None:
    machine = type("Machine", (Accounting,), {"store": store}).TestCase
    machine.settings = settings(max_examples=25, stateful_step_count=30, deadline=None, derandomize=True)
    machine("runTest").runTest()


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(prefix=st.text(min_size=1, max_size=8))
def test_runs_with_different_names_share_nothing(redis_client: redis.Redis, prefix: str) -> None:
    redis_client.flushall()
    one, other = GroupStore(redis_client, "a" + prefix.encode().hex()), GroupStore(redis_client, "b")
    one.feed(make_group())
    assert other.lease("w", 1, None) == [] and other.accounts().fed == 0
