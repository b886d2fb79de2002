"""Which version is current, and which engines count, against a real Redis."""

from __future__ import annotations

import pytest
import redis

from services.contract.policy import ALIVE_S, EngineReport, PolicyBoard, PolicyVersion
from tests.conftest import RedisServer
from tests.reward.conftest import wait_until


@pytest.fixture
def board(redis_client: redis.Redis) -> PolicyBoard:
    return PolicyBoard(redis_client, "test")


def engine(engine_id: str = "e0", **changes: object) -> EngineReport:
    fields: dict = {"engine_id": engine_id, "url": "http://127.0.0.1:1", "state": "ready", "version": 0}
    return EngineReport(**(fields | changes))


def version(number: int) -> PolicyVersion:
    return PolicyVersion(number, f"weights/test/v{number:06d}")


def test_a_fresh_run_has_no_policy(board: PolicyBoard) -> None:
    assert board.current() is None and board.staged() is None and board.live_engines() == []


def test_staging_leaves_the_current_version_as_it_is(board: PolicyBoard) -> None:
    board.commit(version(0))
    board.stage(version(1))
    assert (board.current(), board.staged()) == (version(0), version(1))


def test_committing_moves_both(board: PolicyBoard) -> None:
    board.stage(version(1))
    board.commit(version(1))
    assert (board.current(), board.staged()) == (version(1), version(1))


def test_committing_what_was_never_staged_is_staged_too(board: PolicyBoard) -> None:
    board.commit(version(5))
    assert board.staged() == version(5)


def test_an_engine_is_what_it_last_said_of_itself(board: PolicyBoard) -> None:
    board.report(engine(state="loading", version=-1))
    board.report(engine(state="ready", version=3, staged=4, reading=[3, 4], tensor_parallel=2, worker="w"))
    assert board.live_engines() == [engine(version=3, staged=4, reading=[3, 4], tensor_parallel=2, worker="w")]


def test_a_report_is_a_sign_of_life_for_a_while(board: PolicyBoard) -> None:
    board.report(engine())
    left = board.client.ttl(board.keys.engine_alive("e0"))
    assert ALIVE_S - 2 <= left <= ALIVE_S


def test_an_engine_that_falls_silent_counts_for_nothing(board: PolicyBoard) -> None:
    board.report(engine("silent", reading=[1]))
    board.report(engine("alive"))
    board.client.pexpire(board.keys.engine_alive("silent"), 50)  # the server's own expiry, only sooner
    wait_until(lambda: [report.engine_id for report in board.live_engines()] == ["alive"], 5)
    assert board.client.hkeys(board.keys.engines) == [b"alive"], "taken off the registry"


def test_an_engine_that_speaks_again_counts_again(board: PolicyBoard) -> None:
    board.report(engine())
    board.client.delete(board.keys.engine_alive("e0"))
    assert board.live_engines() == []
    board.report(engine())
    assert board.live_engines() == [engine()]


def test_an_engine_that_leaves_is_gone_at_once(board: PolicyBoard) -> None:
    board.report(engine("a"))
    board.report(engine("b"))
    board.remove("a")
    board.remove("a")
    assert [report.engine_id for report in board.live_engines()] == ["b"]


def test_an_engine_is_held_by_one_worker_at_a_time_and_the_holder_may_renew(board: PolicyBoard) -> None:
    assert board.hold("http://e", "a", 5)
    assert not board.hold("http://e", "b", 5)
    assert board.hold("http://e", "a", 5)
    assert board.hold("http://other", "b", 5)


def test_a_hold_ends_when_it_is_let_go_by_its_holder_only(board: PolicyBoard) -> None:
    board.hold("http://e", "a", 5)
    board.let_go("http://e", "b")
    assert not board.hold("http://e", "b", 5)
    board.let_go("http://e", "a")
    assert board.hold("http://e", "b", 5)


def test_a_hold_runs_out_and_the_note_of_a_pause_stays(board: PolicyBoard) -> None:
    board.hold("http://e", "dead", 0.1)
    board.note_pause("http://e", "dead")
    wait_until(lambda: board.hold("http://e", "b", 5), 5)
    assert board.may_be_paused("http://e")
    board.note_resume("http://e")
    assert not board.may_be_paused("http://e")


def test_runs_share_neither_policy_nor_engines(redis_client: redis.Redis) -> None:
    one, other = PolicyBoard(redis_client, "one"), PolicyBoard(redis_client, "other")
    one.commit(version(1))
    one.report(engine())
    assert other.current() is None and other.live_engines() == []


def test_the_policy_outlives_a_redis_that_is_killed(tmp_path) -> None:
    from services.contract.config import RedisConfig
    from services.contract.store import connect

    server = RedisServer(tmp_path)
    server.start()
    board = PolicyBoard(connect(RedisConfig(url=server.url, retry_s=20)), "test")
    board.commit(version(1))
    board.stage(version(2))
    server.kill()
    server.start()
    assert (board.current(), board.staged()) == (version(1), version(2))
    server.kill()
