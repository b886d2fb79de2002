"""What can never be graded: it is tried `max_tries` times, then its group is dead with the reason, and the queue goes on."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import redis

from services.contract.config import Config
from services.contract.grading import send_for_grading
from services.contract.groups import GroupStore
from services.reward.metrics import Metrics
from services.reward.task import KILLED, Grader, TryFailed
from tests.factories import grade, make_group, make_trajectory
from tests.reward.conftest import Bench, GradingWorker, wait_until

REWARDS = '''
import ctypes, os, signal, sys, time

def reward(episode):
    """The answer says what goes wrong."""
    log = open(os.path.join(os.path.dirname(__file__), "calls"), "a")
    log.write(f"{episode.id}\\n")
    log.close()
    match episode.answer:
        case "loop":
            while True:
                pass
        case "deaf loop":
            while True:
                try:
                    time.sleep(1)
                except BaseException:
                    pass
        case "segmentation fault":
            ctypes.string_at(0)
        case "out of memory":
            os.kill(os.getpid(), signal.SIGKILL)
        case "exit":
            sys.exit(3)
        case "hard exit":
            os._exit(3)
        case "raise":
            raise ValueError("no such judge")
        case "wrong type":
            return "good"
        case "second time":
            with open(__file__ + ".marker", "a+") as marker:
                marker.seek(0)
                if not marker.read():
                    marker.write("x")
                    raise ValueError("not yet")
    return episode.reward
'''


@pytest.fixture(scope="module")
def own_reward(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    folder = tmp_path_factory.mktemp("own")
    (folder / "poison_rewards.py").write_text(REWARDS)
    made = Bench(folder, 'function = "poison_rewards:reward"\nmax_tries = 2\n')
    made.start_worker()
    yield made
    made.close()


def calls(bench: Bench, trajectory_id: str) -> int:
    return (bench.folder / "calls").read_text().split().count(trajectory_id)


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        ("loop", "took longer than reward.soft_time_limit_s (1 s)"),
        ("deaf loop", KILLED),
        ("segmentation fault", KILLED),
        ("out of memory", KILLED),
        ("hard exit", KILLED),
        ("exit", "reward.function poison_rewards:reward raised SystemExit: 3"),
        ("raise", "reward.function poison_rewards:reward raised ValueError: no such judge"),
        ("wrong type", "reward.function poison_rewards:reward returned 'good' as 'reward'"),
    ],
)
def test_a_grading_that_always_fails_takes_its_group_to_dead_and_nothing_else(own_reward: Bench, answer: str, reason: str) -> None:
    bench, group = own_reward, answer.replace(" ", "-")
    bench.play(group, "Paris", answer)
    bench.play(f"after-{group}", "Paris")
    for trajectory_id in (f"{group}/0", f"{group}/1", f"after-{group}/0"):
        send_for_grading(bench.app, trajectory_id)
    wait_until(lambda: bench.is_graded(f"after-{group}/0"), 30, "the queue goes on")
    wait_until(lambda: group in [letter.group_id for letter in bench.letters()], 60, "buried")
    (letter,) = [letter for letter in bench.letters() if letter.group_id == group]
    assert f"{group}/1 cannot be graded (2 of 2 tries): " in letter.reason and reason in letter.reason
    assert letter.attempts == calls(bench, f"{group}/1") == 2
    wait_until(lambda: bench.in_hand() == 0, what="acknowledged")
    assert not bench.store.client.keys(f"*{group}/?") or bench.store.load(f"{group}/0") is None
    assert group not in bench.store.in_flight()
    bench.store.accounts().check()
    wait_until(bench.workers[0].is_ready)


def test_a_grading_that_works_the_second_time_is_graded(own_reward: Bench) -> None:
    own_reward.play("second", "second time")
    send_for_grading(own_reward.app, "second/0")
    wait_until(lambda: own_reward.is_graded("second/0"), 30)
    assert calls(own_reward, "second/0") == 2
    assert not own_reward.store.client.keys("*grading:second/0"), "its tries are forgotten"


def test_a_trajectory_that_cannot_be_read_takes_its_group_to_dead_at_once(bench: Bench, worker: GradingWorker) -> None:
    bench.play("torn", "Paris", "Rome")
    bench.store.client.set(bench.store.keys.trajectory("torn/1"), b"\x81\xa2id\xa1x")
    send_for_grading(bench.app, "torn/1")
    wait_until(lambda: bench.letters(), what="buried")
    (letter,) = bench.letters()
    assert letter.group_id == "torn" and "torn/1 cannot be graded (1 of 3 tries): cannot be read" in letter.reason
    bench.store.accounts().check()


def test_a_trajectory_without_golds_is_graded_as_wrong_with_a_warning(bench: Bench, worker: GradingWorker) -> None:
    bench.store.store(make_trajectory("goldless", golden_answers=[]))
    send_for_grading(bench.app, "goldless/0")
    wait_until(lambda: bench.is_graded("goldless/0"))
    assert bench.rewards()["goldless/0"] == 0.0
    assert "goldless/0 has no golden answers: no answer can match" in worker.output()


# -- the same moves, one by one, without a worker --------------------------------------------------------------------------


@pytest.fixture
def store(redis_client: redis.Redis) -> GroupStore:
    return GroupStore(redis_client, "test")


@pytest.fixture
def grader(redis_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Grader:
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "always_fails.py").write_text("def reward(episode): raise ValueError('no such judge')")
    reward = {"function": "always_fails:reward", "max_tries": 2, "retry_pause_s": 0.2}
    config = Config.model_validate({"run": {"name": "test"}, "redis": {"url": redis_url}, "reward": reward})
    return Grader(config, Metrics())


def test_a_try_that_failed_by_an_error_is_not_made_again_at_once(store: GroupStore, grader: Grader) -> None:
    store.store(make_trajectory("t0", 0))
    started = time.monotonic()
    with pytest.raises(TryFailed):
        grader.grade("t0/0")
    assert time.monotonic() - started >= 0.2


def test_a_group_that_is_still_being_played_is_left_until_it_is_finished(store: GroupStore, grader: Grader) -> None:
    store.feed(make_group("t0", samples=2))
    (lease,) = store.lease("worker", 1, 10)
    store.store(make_trajectory("t0", 0))
    with pytest.raises(TryFailed, match="try 1 of 2 failed, .*no such judge"):
        grader.grade("t0/0")
    assert [grader.grade("t0/0") for _ in range(3)] == ["left"] * 3
    assert store.accounts().leased == 1 and store.accounts().dead == 0
    store.store(make_trajectory("t0", 1))
    assert store.finish(lease)
    assert store.ungraded() == ["t0/0", "t0/1"], "so the sweep sends it again"
    assert grader.grade("t0/0") == "buried"
    (letter,) = store.read_dead()
    assert "no such judge" in letter.reason and letter.attempts == 2
    assert grader.grade("t0/0") == grader.grade("t0/1") == "gone"
    assert (store.accounts().dead, store.accounts().finished) == (1, 0)
    assert not store.client.keys("*t0/*"), "nothing of it is left"
    store.accounts().check()


def test_what_legacy_rules_cannot_grade_is_buried_at_once(store: GroupStore, redis_url: str) -> None:
    legacy = {"run": {"name": "test"}, "redis": {"url": redis_url}, "reward": {"legacy": True}}
    store.feed(make_group("t0", samples=1))
    (lease,) = store.lease("worker", 1, 10)
    store.store(make_trajectory("t0", prompt_text=""))
    store.finish(lease)
    assert Grader(Config.model_validate(legacy), Metrics()).grade("t0/0") == "buried"
    (letter,) = store.read_dead()
    assert "t0/0 cannot be graded (1 of 3 tries): reward.legacy reads the prompt too" in letter.reason


def test_what_was_graded_meanwhile_is_not_buried(store: GroupStore, grader: Grader) -> None:
    store.feed(make_group("t0", samples=1))
    (lease,) = store.lease("worker", 1, 10)
    store.store(make_trajectory("t0"))
    store.finish(lease)
    slow = grader.tries.begin("t0/0", 2)
    assert slow and grade(store, "t0/0")
    assert not grader.tries.bury(slow, "too late", 2)
    assert store.accounts().graded_waiting == 1 and store.read_dead() == []


def test_a_group_that_the_trainer_has_collected_is_not_buried(store: GroupStore, grader: Grader) -> None:
    store.feed(make_group("t0", samples=1))
    store.store(make_trajectory("t0"))
    slow = grader.tries.begin("t0/0", 2)
    store.mark_collected("t0")
    assert slow and not grader.tries.bury(slow, "too late", 2)


def test_burying_twice_counts_once(store: GroupStore, grader: Grader) -> None:
    store.feed(make_group("t0", samples=1))
    (lease,) = store.lease("worker", 1, 10)
    store.store(make_trajectory("t0"))
    store.finish(lease)
    first = grader.tries.begin("t0/0", 2)
    assert first and grader.tries.bury(first, "broken", 2) and not grader.tries.bury(first, "broken", 2)
    assert store.accounts().dead == len(store.read_dead()) == 1


def test_a_trajectory_that_cannot_be_read_does_not_hide_the_others_from_the_sweep(store: GroupStore) -> None:
    store.feed(make_group("t0", samples=2))
    (lease,) = store.lease("worker", 1, 10)
    store.client.set(store.keys.trajectory("t0/0"), b"torn")
    store.store(make_trajectory("t0", 1))
    store.finish(lease)
    assert store.ungraded() == ["t0/0", "t0/1"]
