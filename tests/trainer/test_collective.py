"""The trainer's end of a push without engines: who is asked, and what each silence or refusal is called.

Pushes into real engines are in `tests/rollout/test_push.py`.
"""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import pytest
import redis
import torch

from services.contract.config import Config
from services.contract.policy import EngineReport, PolicyBoard, PolicyVersion
from services.contract.weights import is_published, published_versions
from services.trainer.publishing.buckets import Bucket, fill_buckets
from services.trainer.publishing.collective import Pusher, PushFailed, PushTimes, first_ranks, members_of
from services.trainer.publishing.publish import Publisher

BUCKETS = fill_buckets([("a", torch.ones(4))], torch.float32, 1 << 16)


def engine(name: str, **changes: Any) -> EngineReport:
    return EngineReport(**({"engine_id": name, "url": f"http://{name}", "state": "ready", "version": 0} | changes))


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    return folder


@pytest.fixture
def board(redis_client: redis.Redis) -> PolicyBoard:
    return PolicyBoard(redis_client, "quickstart")


def make_config(model: Path, **weights: Any) -> Config:
    section = {"directory": model.parent / "w", "transport": "collective", "push_timeout_s": 0.5, "push_address": "127.0.0.1"}
    return Config.model_validate({"model": {"path": model}, "weights": section | weights})


def test_every_engine_has_as_many_ranks_as_parts_after_the_trainers() -> None:
    assert first_ranks([engine("a"), engine("b", tensor_parallel=4), engine("c")]) == {"a": 1, "b": 2, "c": 6}


def test_engines_that_start_are_left_out_and_one_with_two_workers_is_asked_once() -> None:
    one = "http://one"
    engines = [engine("w2@one", url=one), engine("w1@one", url=one), engine("stale", state="stale"), engine("new", state="loading")]
    assert [member.engine_id for member in members_of(engines)] == ["stale", "w1@one"]


def push_in_vain(board: PolicyBoard, config: Config) -> str:
    committed: list[int] = []
    with pytest.raises(PushFailed) as failed:
        Pusher(config, board, lambda: None).push(1, BUCKETS, lambda: committed.append(1))
    assert not committed and board.pushes.alive() is None, "the engines see at once that it is over"
    return str(failed.value)


def test_a_push_without_engines_fails(board: PolicyBoard, model: Path) -> None:
    assert push_in_vain(board, make_config(model)) == "no engine serves"


def test_a_worker_that_does_not_answer_fails_the_push_before_any_engine_is_touched(board: PolicyBoard, model: Path) -> None:
    board.report(engine("a"))
    board.report(engine("b", following=1))
    assert push_in_vain(board, make_config(model)) == "a did not answer within weights.push_timeout_s"


def test_an_engine_that_does_not_join_fails_the_push_in_time(board: PolicyBoard, model: Path) -> None:
    board.report(engine("a", following=1))
    assert "not every engine joined within weights.push_timeout_s" in push_in_vain(board, make_config(model))


def test_an_address_that_is_not_the_trainers_fails_the_push_and_not_the_run(board: PolicyBoard, model: Path) -> None:
    board.report(engine("a"))
    assert push_in_vain(board, make_config(model, push_address="no-such-host.invalid"))


@pytest.mark.parametrize(
    ("later", "told"),
    [
        ({"refused": 1}, "a could not go on"),
        ({"state": "loading"}, "a went away"),
        ({}, "a did not pause within weights.push_timeout_s"),
    ],
)
def test_the_failure_of_an_engine_has_a_name(board: PolicyBoard, model: Path, later: dict, told: str) -> None:
    board.report(engine("a", **later))
    with pytest.raises(PushFailed, match=told):
        Pusher(make_config(model), board, lambda: None)._until(1, ["a"], lambda report: report.receiving == 1, "pause")


def test_an_engine_that_is_silent_is_gone(board: PolicyBoard, model: Path) -> None:
    with pytest.raises(PushFailed, match="a went away"):
        Pusher(make_config(model), board, lambda: None)._until(1, ["a"], lambda report: True, "pause")


# -- what becomes of the volume --------------------------------------------------------------------------------------------


class PusherStandIn:
    """Commits as if every engine had received the weights; or fails."""

    fails = False

    def push(self, version: int, buckets: list[Bucket], commit: Any) -> PushTimes:
        if self.fails:
            raise PushFailed("for the test")
        commit()
        return PushTimes(0.0, 0.0, 0.0)


def make_publisher(board: PolicyBoard, model: Path, **weights: Any) -> tuple[Publisher, PusherStandIn]:
    publisher, pusher = Publisher(make_config(model, **weights), board, lambda: None), PusherStandIn()
    publisher._pusher = pusher  # type: ignore[assignment]
    return publisher, pusher


def export() -> Any:
    return iter([("a", torch.ones(4))])


def test_every_so_many_pushed_versions_one_goes_to_the_volume(board: PolicyBoard, model: Path) -> None:
    publisher, _ = make_publisher(board, model, volume_every=3, keep_last=9)
    for version in range(1, 8):
        publisher.publish(version, version - 1, export)
    assert published_versions(publisher.root) == [3, 6]
    assert board.current() == PolicyVersion(7, str(publisher.root / "v000007"), pushed=True)


def test_a_push_that_fails_brings_the_version_over_the_volume(board: PolicyBoard, model: Path) -> None:
    publisher, pusher = make_publisher(board, model, volume_every=3)
    pusher.fails = True
    publisher.publish(1, 0, export)
    assert board.current() == PolicyVersion(1, str(publisher.root / "v000001")) and publisher.serves(1)


def test_a_checkpoint_has_its_version_on_the_volume(board: PolicyBoard, model: Path) -> None:
    publisher, _ = make_publisher(board, model, volume_every=100)
    publisher.publish(1, 0, export)
    assert not publisher.serves(1)
    publisher.put_on_volume()
    publisher.put_on_volume()
    assert publisher.serves(1) and published_versions(publisher.root) == [1]


@pytest.mark.parametrize(("state", "written"), [("loading", True), ("stale", True), ("ready", False)])
def test_while_it_waits_the_trainer_writes_a_version_that_an_engine_lacks(
    board: PolicyBoard, model: Path, state: str, written: bool
) -> None:
    publisher, _ = make_publisher(board, model, volume_every=100)
    publisher.publish(1, 0, export)
    board.report(engine("late", state=state))
    publisher.wait()
    assert is_published(publisher.root, 1) == written


def test_a_number_that_a_failed_push_used_is_not_used_again(board: PolicyBoard, model: Path) -> None:
    board.report(engine("a"))
    push_in_vain(board, make_config(model))
    assert make_publisher(board, model)[0].next_version() == 2


def test_the_lease_is_renewed_while_a_push_takes_its_time(board: PolicyBoard, model: Path) -> None:
    config = make_config(model, push_lease_s=0.4, push_timeout_s=2)
    board.report(engine("a"))
    seen: list[bool] = []
    thread = threading.Thread(target=lambda: [time.sleep(1.2), seen.append(board.pushes.alive() is not None)])
    thread.start()
    push_in_vain(board, config)
    thread.join()
    assert seen == [True]
