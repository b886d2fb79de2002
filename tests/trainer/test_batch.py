"""From graded trajectories to a batch: complete groups only, none too stale, none twice, none lost over a restart."""

from __future__ import annotations

import threading
from collections.abc import Container

import msgspec
import pytest
import redis

from services.contract.config import Config
from services.contract.grading_tries import GradingTries, Try
from services.contract.groups import GroupStore, Lease
from services.contract.messages import Question
from services.trainer.durable.ledger import Ledger
from services.trainer.feeding import collect
from services.trainer.feeding.batch import Batches
from services.trainer.feeding.collect import Collector, CollectTimeout
from services.trainer.feeding.questions import TrainingOrder
from tests.factories import grade, make_trajectory

GROUPS, SAMPLES = 3, 2


@pytest.fixture
def store(redis_client: redis.Redis) -> GroupStore:
    return GroupStore(redis_client, "test")


def make_batches(store: GroupStore, ledger: Ledger, max_staleness: int = 0, timeout_s: float = 5, **objective: object) -> Batches:
    trainer = {"groups_per_step": GROUPS, "samples_per_prompt": SAMPLES, "max_staleness": max_staleness, "objective": objective}
    config = Config.model_validate({"trainer": trainer})
    questions = [Question(str(i), "capital", f"Question {i}?", ["Paris"]) for i in range(10)]
    collector = Collector(store, timeout_s, check_stop=lambda: None)
    return Batches(config, store, collector, TrainingOrder(questions, seed=0), ledger)


def play_all(store: GroupStore, version: int, samples: int = SAMPLES, equal: Container[int] = ()) -> list[Lease]:
    """What a rollout worker and a grader do with all waiting groups. equal: questions whose rewards come out equal."""
    leases = store.lease("worker", 100, 10)
    for lease in leases:
        for sample in range(samples):
            store.store(make_trajectory(lease.group.group_id, sample, versions=(version,)))
            reward = 0.0 if int(lease.group.group_id[1:]) in equal else float(sample)
            grade(store, f"{lease.group.group_id}/{sample}", reward)
        if samples == SAMPLES:
            store.finish(lease)
    return leases


def train_on(batches: Batches, version: int = 0) -> list[str]:
    groups = batches.next_batch()
    batches.consume(groups)
    batches.release(groups)
    return [group.group_id for group in groups]


def test_a_batch_is_whole_groups_in_the_order_of_their_questions(store: GroupStore) -> None:
    batches = make_batches(store, Ledger())
    batches.feed()
    play_all(store, version=0)
    groups = batches.next_batch()
    assert [g.group_id for g in groups] == ["t00000000", "t00000001", "t00000002"]
    assert [[t.id for t in g.trajectories] for g in groups][0] == ["t00000000/0", "t00000000/1"]
    assert groups[0].rewards == [0.0, 1.0]


def test_feed_stops_at_the_staleness_bound(store: GroupStore) -> None:
    assert make_batches(store, Ledger()).feed() == GROUPS
    assert make_batches(store, Ledger()).feed() == 0
    assert make_batches(store, Ledger(), max_staleness=1).feed() == GROUPS


def test_nothing_is_fed_ahead_of_the_last_step(store: GroupStore) -> None:
    batches = make_batches(store, Ledger(), max_staleness=1)
    batches.ledger.step = batches.config.trainer.steps - 1
    assert batches.feed() == GROUPS


def test_a_stale_group_is_fed_again_and_never_trained(store: GroupStore) -> None:
    ledger = Ledger(version=5)
    batches = make_batches(store, ledger)
    batches.feed()
    play_all(store, version=4)
    worker = threading.Timer(0.5, play_all, [store, 5])
    worker.start()
    groups = batches.next_batch()
    worker.join()
    assert {t.lowest_version for g in groups for t in g.trajectories} == {5}
    assert batches.refed == GROUPS
    store.accounts().check()


def learned_and_published(ledger: Ledger, version: int, policies_kept: int = 2) -> Ledger:
    ledger.unpublished = True
    ledger.publish(version, policies_kept)
    return ledger


def test_within_the_bound_an_older_group_is_trained(store: GroupStore) -> None:
    ledger = learned_and_published(Ledger(version=4), 5)
    batches = make_batches(store, ledger, max_staleness=1)
    batches.feed()
    play_all(store, version=4)
    assert len(batches.next_batch()) == GROUPS
    assert batches.refed == 0


def test_a_group_that_the_graders_gave_up_is_replaced_and_what_was_graded_of_it_is_released(store: GroupStore) -> None:
    batches = make_batches(store, Ledger())
    batches.feed()
    first, *others = store.lease("worker", 100, 10)
    for sample in range(SAMPLES):
        store.store(make_trajectory(first.group.group_id, sample))
    grade(store, "t00000000/0")
    store.finish(first)
    tries = GradingTries(store.client, "test")
    failed = tries.begin("t00000000/1", 1)
    assert isinstance(failed, Try)
    tries.bury(failed, "no such judge", 1)
    for lease in others:
        store.hand_back(lease)
    play_all(store, version=0)
    worker = threading.Timer(0.8, play_all, [store, 0])
    worker.start()
    groups = batches.next_batch()
    worker.join()
    assert [g.group_id for g in groups] == ["t00000001", "t00000002", "t00000003"]
    announced = [n.notice.group_id for n in store.read_graded(100, 10, pending_after=b"0")]
    assert "t00000000" not in announced and len(announced) == GROUPS * SAMPLES
    store.accounts().check()


def test_what_was_played_before_a_restart_published_the_same_weights_anew_is_trained(store: GroupStore) -> None:
    ledger = Ledger(version=4)
    first = make_batches(store, ledger)
    first.feed()
    play_all(store, version=4)
    ledger.publish(7, policies_kept=1)
    assert len(make_batches(store, ledger).next_batch()) == GROUPS


def test_a_straggler_holds_no_step_up_and_is_fed_again_when_it_comes_too_late(store: GroupStore) -> None:
    ledger = Ledger()
    batches = make_batches(store, ledger, max_staleness=1)
    batches.feed()
    (straggler,) = store.lease("slow", 1, 10)
    trained: list[str] = []
    for version in (1, 2, 3):
        play_all(store, version=version - 1)
        trained += train_on(batches)
        learned_and_published(ledger, version)
        batches.feed()
    assert "t00000000" not in trained and len(trained) == 3 * GROUPS
    for sample in range(SAMPLES):
        store.store(make_trajectory("t00000000", sample, versions=(0,)), straggler)
        grade(store, f"t00000000/{sample}", float(sample))
    store.finish(straggler)
    with KeepPlaying(store, equal=(), version=3):
        trained += [*train_on(batches), *train_on(batches)]
    assert batches.refed == 1 and "t00000000" in trained
    store.accounts().check()


def test_a_group_that_died_while_nobody_asked_is_counted_and_replaced(store: GroupStore) -> None:
    """Its letter is read by an evaluation that waits for other groups."""
    batches = make_batches(store, Ledger())
    batches.feed()
    store.bury(store.lease("worker", 1, 10)[0], "broken")
    assert batches.collector.take_dead(lambda group_id: None) == []
    with KeepPlaying(store, equal=()):
        groups = batches.next_batch()
    assert [g.group_id for g in groups] == ["t00000001", "t00000002", "t00000003"]
    assert batches.lost == 1 and batches.figures()["groups_lost"] == 1


def test_a_group_that_redis_announces_twice_is_in_the_batch_once(store: GroupStore) -> None:
    """A Redis that lost its last writes is told again of what the trainer holds already."""
    batches = make_batches(store, Ledger())
    batches.feed()
    leases = store.lease("worker", 1, 10)
    for sample in range(SAMPLES):
        store.store(make_trajectory("t00000000", sample))
        grade(store, f"t00000000/{sample}", float(sample))
    store.finish(leases[0])
    notices = [fields for _, fields in store.client.xrange(store.keys.graded)]

    def announce_again() -> None:
        if "t00000000" in batches._cut and notices:
            for fields in notices:
                store.client.xadd(store.keys.graded, fields)
            notices.clear()
            play_all(store, version=0)

    batches.collector.check_stop = announce_again
    real_wait = batches.collector.wait
    batches.collector.wait = lambda size, count, on_idle: real_wait(size, 1, on_idle)  # a group at a time
    assert [g.group_id for g in batches.next_batch()] == ["t00000000", "t00000001", "t00000002"]


@pytest.mark.parametrize("change", ["samples", "questions", "seed"])
def test_what_was_fed_under_other_settings_is_fed_again(store: GroupStore, change: str, caplog: pytest.LogCaptureFixture) -> None:
    ledger = Ledger()
    first = make_batches(store, ledger)
    first.take_over()
    first.feed()
    play_all(store, version=0, samples=SAMPLES)
    second = make_batches(store, msgspec.json.decode(msgspec.json.encode(ledger), type=Ledger))
    if change == "samples":
        trainer = second.config.trainer.model_copy(update={"samples_per_prompt": SAMPLES + 1})
        second.config = second.config.model_copy(update={"trainer": trainer})
    else:
        questions = second.order.questions[: 10 - (change == "questions")]
        second.order = TrainingOrder(questions, seed=int(change == "seed"))
    second.take_over()
    assert "question number 0 and those after it are counted in the new order" in caplog.text
    assert store.in_flight() == set() and store.client.keys("*trajectory*") == []
    assert second.feed() == GROUPS
    store.accounts().check()


def test_what_was_fed_under_the_same_settings_stays(store: GroupStore) -> None:
    ledger = Ledger()
    for _ in range(2):
        batches = make_batches(store, ledger)
        batches.take_over()
        batches.feed()
    assert store.accounts().fed == GROUPS == len(store.in_flight())


def test_a_dead_group_is_replaced_by_the_next_question(store: GroupStore) -> None:
    ledger = Ledger()
    batches = make_batches(store, ledger)
    batches.feed()
    (first, *others) = store.lease("worker", 100, 10)
    store.bury(first, "broken")
    for lease in others:
        store.hand_back(lease)
    play_all(store, version=0)
    worker = threading.Timer(0.8, play_all, [store, 0])
    worker.start()
    groups = batches.next_batch()
    worker.join()
    assert [g.group_id for g in groups] == ["t00000001", "t00000002", "t00000003"]
    assert ledger.is_consumed(0) and batches.lost == 1


class KeepPlaying:
    """Plays whatever is fed, until the test leaves."""

    def __init__(self, store: GroupStore, equal: Container[int], version: int = 0) -> None:
        self.store, self.equal, self.version, self.over = store, equal, version, threading.Event()
        self.thread = threading.Thread(target=self._play)

    def __enter__(self) -> None:
        self.thread.start()

    def __exit__(self, *_: object) -> None:
        self.over.set()
        self.thread.join()

    def _play(self) -> None:
        while not self.over.wait(0.05):
            play_all(self.store, version=self.version, equal=self.equal)


def test_groups_of_equal_rewards_are_replaced_by_the_next_questions(store: GroupStore) -> None:
    batches = make_batches(store, Ledger(), dynamic_sampling=True)
    with KeepPlaying(store, equal={0, 2, 3}):
        groups = batches.next_batch()
    assert [g.group_id for g in groups] == ["t00000001", "t00000004", "t00000005"]
    assert batches.dropped == 3 == batches.figures()["groups_dropped"]
    assert all(batches.ledger.is_consumed(i) for i in (0, 2, 3))
    store.accounts().check()


def test_they_are_taken_when_too_many_were_replaced(store: GroupStore) -> None:
    batches = make_batches(store, Ledger(), dynamic_sampling=True, dynamic_sampling_limit=2)
    with KeepPlaying(store, equal=range(100)):
        groups = batches.next_batch()
    assert [g.group_id for g in groups] == ["t00000006", "t00000007", "t00000008"]
    assert batches.dropped == 2 * GROUPS


def test_every_step_may_replace_anew(store: GroupStore) -> None:
    batches = make_batches(store, Ledger(), dynamic_sampling=True, dynamic_sampling_limit=1)
    with KeepPlaying(store, equal=range(100)):
        trained = [train_on(batches) for _ in range(2)]
    assert [[int(g[1:]) for g in step] for step in trained] == [[3, 4, 5], [9, 10, 11]]


def test_without_dynamic_sampling_equal_rewards_are_a_batch_like_any_other(store: GroupStore) -> None:
    batches = make_batches(store, Ledger())
    batches.feed()
    play_all(store, version=0, equal=range(100))
    assert len(batches.next_batch()) == GROUPS
    assert "groups_dropped" not in batches.figures()


def test_an_overlong_rollout_makes_the_difference(store: GroupStore) -> None:
    """What counts is the reward that is learned from."""
    batches = make_batches(store, Ledger(), dynamic_sampling=True, overlong_tokens=4, overlong_buffer=4)
    batches.feed()
    play_all(store, version=0)
    groups = batches.next_batch()
    assert batches.dropped == 0 and len(groups) == GROUPS


def test_a_dropped_group_that_no_checkpoint_knows_is_asked_again(store: GroupStore) -> None:
    first = make_batches(store, Ledger(), dynamic_sampling=True)
    with KeepPlaying(store, equal={0}):
        first.next_batch()
    second = make_batches(store, Ledger(), dynamic_sampling=True)
    second.take_over()
    with KeepPlaying(store, equal=()):
        assert [g.group_id for g in second.next_batch()][0] == "t00000001"
        second.consume([])
        assert not second.ledger.is_consumed(0)
    store.accounts().check()


def test_what_was_collected_but_not_checkpointed_is_served_to_the_next_trainer(store: GroupStore) -> None:
    first = make_batches(store, Ledger())
    first.feed()
    play_all(store, version=0)
    seen = [g.group_id for g in first.next_batch()]
    second = make_batches(store, Ledger())
    assert second.feed() == 0, "its groups are still in flight"
    assert [g.group_id for g in second.next_batch()] == seen


def test_what_the_checkpoint_contains_is_released_and_never_served_again(store: GroupStore) -> None:
    first = make_batches(store, Ledger())
    first.feed()
    play_all(store, version=0)
    groups = first.next_batch()
    ledger = Ledger()
    ledger.consume([0, 1, 2])  # the checkpoint was durable; the crash came before the release
    second = make_batches(store, ledger)
    second.take_over()
    assert store.accounts().released == GROUPS
    second.feed()
    play_all(store, version=0)
    again = [g.group_id for g in second.next_batch()]
    assert not set(again) & {g.group_id for g in groups}
    assert store.client.keys("*trajectory:t00000000*") == []


def test_every_question_is_trained_once_an_epoch(store: GroupStore) -> None:
    batches = make_batches(store, Ledger())
    trained: list[str] = []
    for _ in range(10):
        batches.feed()
        play_all(store, version=0)
        trained += train_on(batches)
    questions = [batches.order[int(g[1:])].id for g in trained]
    assert len(trained) == len(set(trained)) == 30
    assert all(sorted(questions[i : i + 10], key=int) == [str(n) for n in range(10)] for i in (0, 10, 20))
    assert batches.ledger.next_index == 30 and batches.ledger.consumed_beyond == []


def test_waiting_in_vain_says_where_the_groups_are(store: GroupStore) -> None:
    batches = make_batches(store, Ledger(), timeout_s=0.5)
    with pytest.raises(CollectTimeout, match=r"waiting=3.*need a rollout worker"):
        batches.next_batch()


def test_half_a_group_is_not_a_batch(store: GroupStore) -> None:
    batches = make_batches(store, Ledger(), timeout_s=0.5)
    batches.feed()
    play_all(store, version=0, samples=SAMPLES - 1)
    with pytest.raises(CollectTimeout):
        batches.next_batch()


def test_a_group_that_lost_a_body_is_fed_again(store: GroupStore) -> None:
    batches = make_batches(store, Ledger())
    batches.feed()
    play_all(store, version=0)
    store.client.delete(store.keys.trajectory("t00000001/0"))
    worker = threading.Timer(0.5, play_all, [store, 0])
    worker.start()
    groups = batches.next_batch()
    worker.join()
    assert [g.group_id for g in groups] == ["t00000000", "t00000001", "t00000002"]


def test_groups_that_redis_forgot_are_fed_again(store: GroupStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(collect, "IDLE_S", 0.5)
    batches = make_batches(store, Ledger())
    batches.feed()
    threading.Timer(0.3, store.client.flushall).start()
    worker = threading.Timer(2.5, play_all, [store, 0])
    worker.start()
    groups = batches.next_batch()
    worker.join()
    assert [g.group_id for g in groups] == ["t00000000", "t00000001", "t00000002"]


def test_notices_that_a_broken_connection_swallowed_are_read_again(store: GroupStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """Redis has delivered them to the trainer, whose connection ended before the answer came."""
    monkeypatch.setattr(collect, "IDLE_S", 0.5)
    batches = make_batches(store, Ledger())
    batches.feed()
    play_all(store, version=0)
    assert len(store.read_graded(100, 10)) == GROUPS * SAMPLES
    assert [g.group_id for g in batches.next_batch()] == ["t00000000", "t00000001", "t00000002"]


def test_the_question_order_depends_on_the_seed_alone() -> None:
    questions = [Question(str(i), "s", "q", ["a"]) for i in range(50)]
    one, same, other = (TrainingOrder(questions, seed) for seed in (1, 1, 2))
    indices = range(120)
    assert [one[i].id for i in indices] == [same[i].id for i in indices]
    assert [one[i].id for i in range(50)] != [other[i].id for i in range(50)]
    assert msgspec.json.encode(one[0]) != b""


def test_of_an_asynchronous_run_no_more_is_fed_ahead_than_keeps_the_trainer_busy(store: GroupStore) -> None:
    ledger = Ledger()
    batches = make_batches(store, ledger, max_staleness=3)
    batches.feed()
    outstanding = []
    for version in range(4):
        play_all(store, version)
        train_on(batches, version)
        learned_and_published(ledger, version + 1, policies_kept=4)
        outstanding.append(len(store.in_flight()))
    assert outstanding == [GROUPS] * 4, "a batch is finished whenever the trainer asks for one"

    def play_what_is_waited_for() -> None:
        play_all(store, ledger.version)

    batches.collector.check_stop = play_what_is_waited_for
    for version in range(4, 8):
        train_on(batches, version)
        learned_and_published(ledger, version + 1, policies_kept=4)
        outstanding.append(len(store.in_flight()))
    assert outstanding[4:] == [GROUPS, 2 * GROUPS, 2 * GROUPS, 3 * GROUPS], (
        "the trainer waits: a batch more, if that is too little another"
    )
    assert batches.figures()["lookahead"] == 3 * GROUPS
