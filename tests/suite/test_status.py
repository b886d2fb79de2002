"""What `forage status` sees of a run: real Redis, real streams, real files; and what it does when one of them is away."""

from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest
import redis

from services.contract.config import Config
from services.contract.grading import grading_queue
from services.contract.groups import GroupStore
from services.contract.policy import EngineReport, PolicyBoard, PolicyVersion
from services.suite.observe import Snapshot
from services.suite.redis_address import address_file, with_address
from services.suite.speed import BODIES, WINDOW_S, Finished, speed
from services.suite.status import Watch
from tests.conftest import RedisServer
from tests.factories import grade, make_group, make_trajectory
from tests.suite.conftest import configure


def look(config: Config) -> Snapshot:
    seen = Watch(config).look()
    assert seen.redis, seen.problem
    return seen.redis


def play(store: GroupStore, group_id: str, graded: int = 2, worker: str = "w1") -> None:
    """Feed, lease and finish a group of two, of whose samples so many are graded."""
    store.feed(make_group(group_id))
    (lease,) = store.lease(worker, 1, 10)
    for sample in range(2):
        trajectory = make_trajectory(group_id, sample, worker=worker)
        store.store(trajectory)
        if sample < graded:
            grade(store, trajectory.id, 1.0, exact_match=1.0)
    store.finish(lease)


# -- Redis -------------------------------------------------------------------------------------------------------------


def test_groups_are_counted_by_state(config: Config, store: GroupStore) -> None:
    play(store, "t0", graded=2)
    play(store, "t1", graded=1)
    store.feed(make_group("t2"))
    store.lease("w1", 1, 10)
    store.feed(make_group("t3"))
    seen = look(config)
    assert seen.accounts == store.accounts()
    assert (seen.accounts.waiting, seen.accounts.leased, seen.accounts.ungraded, seen.accounts.graded_waiting) == (1, 1, 1, 1)
    assert seen.balanced


def test_looking_changes_nothing_in_redis(config: Config, store: GroupStore, redis_client: redis.Redis) -> None:
    play(store, "t0", graded=1)
    store.feed(make_group("t1"))
    store.lease("w1", 1, 10)
    PolicyBoard(redis_client, "test").report(EngineReport("gone", "http://x", "ready", 0))
    redis_client.delete(store.keys.engine_alive("gone"))
    before = {key: redis_client.dump(key) for key in redis_client.scan_iter()}
    look(config)
    assert {key: redis_client.dump(key) for key in redis_client.scan_iter()} == before


def test_a_run_that_redis_does_not_know_is_said_with_those_that_it_does(config: Config, redis_client: redis.Redis) -> None:
    GroupStore(redis_client, "another")
    before = redis_client.dbsize()
    status = Watch(config).look()
    assert status.redis is None
    assert status.problem and "knows no run test yet; it knows another" in status.problem
    assert redis_client.dbsize() == before


def test_the_age_of_the_oldest_in_every_queue(config: Config, store: GroupStore) -> None:
    play(store, "t0", graded=2)
    play(store, "t1", graded=0)
    for group in ("t2", "t3", "t4"):
        store.feed(make_group(group))
    store.lease("w2", 1, 10)
    time.sleep(1.1)
    queues = look(config).queues
    ages = (queues.waiting_s, queues.leased_s, queues.ungraded_s, queues.graded_s, queues.silent_s)
    assert all(age is not None and 1 <= age < 60 for age in ages), ages
    assert queues.leased_by == queues.silent_by == "w2"


def test_queues_that_are_empty_have_no_age(config: Config, store: GroupStore) -> None:
    queues = look(config).queues
    assert (queues.waiting_s, queues.leased_s, queues.ungraded_s, queues.graded_s, queues.silent_s) == (None,) * 5


def test_the_oldest_that_waits_is_not_one_that_is_leased(config: Config, store: GroupStore) -> None:
    store.feed(make_group("t0"))
    store.lease("w1", 1, 10)
    time.sleep(1.1)
    store.feed(make_group("t1"))
    waiting = look(config).queues.waiting_s
    assert waiting is not None and waiting < 1


def test_what_the_trainer_has_read_waits_no_more(config: Config, store: GroupStore) -> None:
    play(store, "t0", graded=2)
    assert look(config).queues.graded_s is not None
    store.read_graded(10, 10)
    assert look(config).queues.graded_s is None


def test_groups_finished_before_times_were_noted_have_no_age(config: Config, store: GroupStore) -> None:
    play(store, "t0", graded=0)
    store.client.hset(store.keys.states, "t0", "finished 2")
    seen = look(config)
    assert seen.accounts.ungraded == 1 and seen.queues.ungraded_s is None


def test_the_graders_queue_is_counted_in_celerys_database(config: Config, store: GroupStore, redis_url: str) -> None:
    broker = redis.Redis.from_url(redis_url.removesuffix("/0") + f"/{config.reward.database}")
    broker.lpush(grading_queue("test"), b"1", b"2")
    broker.hset("unacked", "tag", b"3")
    queues = look(config).queues
    assert (queues.grading, queues.in_hand) == (2, 1)


def test_engines_show_state_version_load_and_silence(config: Config, store: GroupStore, redis_client: redis.Redis) -> None:
    board = PolicyBoard(redis_client, "test")
    board.commit(PolicyVersion(4, "/weights/v000004"))
    board.stage(PolicyVersion(5, "/weights/v000005"))
    board.report(EngineReport("e1", "http://a", "ready", 4, staged=5, worker="e1"))
    board.report(EngineReport("e2", "http://b", "stale", 3, worker="e2"))
    redis_client.delete(store.keys.engine_alive("e2"))
    play(store, "t0", worker="e1")
    store.feed(make_group("t1"))
    store.lease("e1", 1, 10)
    seen = look(config)
    first, second = seen.engines
    assert (first.state, first.version, first.staged, first.groups) == ("ready", 4, 5, 1)
    assert first.reported_s is not None and first.reported_s < 10
    assert first.tokens_per_s == pytest.approx(2 * 4 / WINDOW_S)
    assert second.reported_s is None and second.groups == 0
    assert (seen.current, seen.staged) == (4, 5)


def test_dead_letters_are_counted_by_reason_whatever_the_numbers_in_it(config: Config, store: GroupStore) -> None:
    for i, reason in enumerate(["deadline: 12 s", "deadline: 340 s", "the retriever is away"]):
        store.feed(make_group(f"t{i}"))
        (lease,) = store.lease("w1", 1, 10)
        store.bury(lease, reason)
    first, second = look(config).dead
    assert (first.count, first.reason, first.latest) == (2, "deadline: 340 s", "t1")
    assert (second.count, second.reason) == (1, "the retriever is away")


def test_events_come_latest_first(config: Config, store: GroupStore) -> None:
    store.announce("one")
    store.announce("two")
    assert [event.text for event in look(config).events] == ["two", "one"]


def test_records_that_cannot_be_read_are_counted_and_passed_over(config: Config, store: GroupStore) -> None:
    play(store, "t0")
    store.client.hset(store.keys.engines, "e1", b"not json")
    store.client.hset(store.keys.policy, "current", b"{}")
    store.client.xadd(store.keys.dead, {"body": b"\xc1"})
    store.client.xadd(store.keys.graded, {"body": b"\xc1"})
    store.client.set(store.keys.trajectory("t0/1"), b"\x81\xa2id\xa1x")
    status = Watch(config).look()
    assert status.redis and status.redis.unreadable == 5
    assert any("5 record(s) in Redis cannot be read" in sentence for sentence in status.attention)


# -- speed -------------------------------------------------------------------------------------------------------------


def test_the_speed_remembers_what_the_trainer_has_released_meanwhile(config: Config, store: GroupStore) -> None:
    play(store, "t0")
    watch = Watch(config)
    before = watch.look().redis
    entries = store.read_graded(10, 10)
    store.release("t0", ["t0/0", "t0/1"], [graded.entry_id for graded in entries])
    after = watch.look().redis
    assert before and after and before.speed == after.speed
    assert after.speed.trajectories == 2 and after.speed.tokens_per_s == pytest.approx(8 / WINDOW_S)
    assert look(config).speed.trajectories == 0, "who looks for the first time cannot know"


def test_more_than_is_read_counts_with_the_mean_of_what_was_read(config: Config, store: GroupStore) -> None:
    for i in range(BODIES // 2 + 10):
        play(store, f"t{i}")
    seen = look(config).speed
    assert seen.trajectories == BODIES + 20
    assert seen.tokens_per_s == pytest.approx(4 * seen.trajectories / WINDOW_S)


def test_speed_is_shared_out_among_workers_as_far_as_they_are_known() -> None:
    seen = speed([Finished(0, 30, "a"), Finished(0, 90, "b"), Finished(0, None, ""), Finished(0, None, "")])
    assert seen.trajectories == 4
    assert seen.by_worker == {"a": pytest.approx(1.0), "b": pytest.approx(3.0)}
    assert seen.tokens_per_s == pytest.approx(4.0)


def test_without_one_known_length_there_is_no_speed() -> None:
    assert speed([]).tokens_per_s == speed([Finished(0, None, "")]).tokens_per_s == 0


# -- Redis away --------------------------------------------------------------------------------------------------------


def test_a_redis_that_is_away_is_said_and_found_again(tmp_path: Path) -> None:
    server = RedisServer(tmp_path)
    watch = Watch(configure(tmp_path, server.url))
    status = watch.look()
    assert status.redis is None and status.problem and "cannot be reached: is the suite running?" in status.problem
    server.start()
    try:
        GroupStore(redis.Redis(port=server.port), "test")
        assert watch.look().redis
    finally:
        server.kill()
    assert watch.look().redis is None


def test_a_wrong_password_is_named_and_not_printed(
    config: Config, redis_client: redis.Redis, tmp_path: Path, redis_url: str
) -> None:
    redis_client.config_set("requirepass", "right")
    try:
        problem = Watch(configure(tmp_path, redis_url, FORAGE_REDIS__PASSWORD="hush")).look().problem
    finally:
        redis_client.execute_command("AUTH", "right")
        redis_client.config_set("requirepass", "")
    assert problem and "FORAGE_REDIS__PASSWORD" in problem and "hush" not in problem


def test_the_address_comes_from_the_environment_then_from_the_local_suite_then_from_the_file(tmp_path: Path) -> None:
    config = configure(tmp_path, "redis://configured:1/0")
    assert with_address(config, {}).redis.url == "redis://configured:1/0"
    address_file(config).parent.mkdir(parents=True)
    address_file(config).write_text("redis://suite:2/0\n")
    assert with_address(config, {}).redis.url == "redis://suite:2/0"
    assert with_address(config, {"FORAGE_REDIS__URL": "redis://configured:1/0"}).redis.url == "redis://configured:1/0"


def test_a_suite_that_starts_anew_on_another_port_is_followed(tmp_path: Path, store: GroupStore, redis_url: str) -> None:
    config = configure(tmp_path, "redis://127.0.0.1:1/0")
    watch = Watch(config)
    assert watch.look().redis is None
    address_file(config).parent.mkdir(parents=True)
    address_file(config).write_text(redis_url)
    assert watch.look().redis


# -- the command -------------------------------------------------------------------------------------------------------


def command(config: Config, *arguments: str) -> tuple[list[str], dict[str, str]]:
    environment = os.environ | {"FORAGE_RUN__DIRECTORY": str(config.run.directory), "FORAGE_RUN__NAME": "test"}
    environment["FORAGE_REDIS__URL"] = config.redis.url
    return [sys.executable, "-m", "services.suite", "status", "--config", "configs/smoke.toml", *arguments], environment


def test_json_is_plain_and_the_exit_code_tells_whether_the_run_was_seen(config: Config, store: GroupStore) -> None:
    store.announce("\x1b[31mred\x9b")
    arguments, environment = command(config, "--json")
    done = subprocess.run(arguments, env=environment, capture_output=True, text=True)
    seen = json.loads(done.stdout)
    assert done.returncode == 0 and done.stdout.isascii() and "\x1b" not in done.stdout
    assert seen["redis"]["accounts"] == msgspec.to_builtins(store.accounts())
    assert seen["redis"]["events"][0]["text"] == "\x1b[31mred\x9b"
    done = subprocess.run(
        arguments, env=environment | {"FORAGE_REDIS__URL": "redis://127.0.0.1:1/0"}, capture_output=True, text=True
    )
    assert done.returncode == 1 and json.loads(done.stdout)["redis"] is None


def test_without_a_terminal_one_table_is_printed_without_colours(config: Config, store: GroupStore) -> None:
    arguments, environment = command(config)
    done = subprocess.run(arguments, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and "0 waiting" in done.stdout
    assert "\x1b" not in done.stdout and done.stderr == ""


def test_on_a_terminal_it_goes_on_until_ctrl_c_and_leaves_its_last_table(config: Config, store: GroupStore) -> None:
    arguments, environment = command(config, "--every", "0.2")
    terminal, other = pty.openpty()
    streams = {"stdin": other, "stdout": other, "stderr": other}
    process = subprocess.Popen(arguments, env=environment | {"TERM": "xterm"}, preexec_fn=heed_ctrl_c, **streams)
    os.close(other)
    try:
        read_until(terminal, "1 waiting", before=lambda: store.feed(make_group("t0")))
        process.send_signal(signal.SIGINT)
        rest = read_until(terminal, None)
        assert process.wait(30) == 0
    finally:
        process.kill()
        os.close(terminal)
    assert "\x1b[?1049l" in rest, "the screen from before is shown again"
    assert "1 waiting" in rest.partition("\x1b[?1049l")[2] and "Traceback" not in rest


def heed_ctrl_c() -> None:
    """What a background job's children inherit otherwise is to ignore it."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def read_until(terminal: int, text: str | None, before: Callable[[], object] = lambda: None) -> str:
    """What the terminal gets until `text` appears, or until the other side closes. `before` runs once it gets anything."""
    seen = ""
    while text is None or text not in seen:
        try:
            seen += os.read(terminal, 65536).decode(errors="replace")
        except OSError:  # Linux's way to say that the other side is closed
            assert text is None, seen[-2000:]
            return seen
        before()
        before = lambda: None  # noqa: E731
    return seen
