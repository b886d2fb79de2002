"""A grading message that a broker lost is sent again; one that is only waiting is not sent over and over."""

from __future__ import annotations

import time

import pytest
import redis

from services.contract.config import Config, RunConfig
from services.contract.grading import grading_app, grading_queue
from services.contract.groups import GroupStore
from services.reward import sweep
from services.reward.sweep import Sweep
from tests.factories import grade, make_group, make_trajectory
from tests.reward.conftest import wait_until


@pytest.fixture
def config(redis_url: str) -> Config:
    return Config.model_validate({"run": {"name": "test"}, "redis": {"url": redis_url}})


def test_only_overdue_trajectories_of_finished_groups_are_sent_again_and_once(redis_client: redis.Redis, config: Config) -> None:
    store = GroupStore(redis_client, "test")
    for group_id in ("t0", "t1"):
        store.feed(make_group(group_id, samples=2))
    first, _ = store.lease("worker", 2, 10)
    for sample in range(2):
        store.store(make_trajectory("t0", sample))
    store.store(make_trajectory("t1", 0))  # still being played
    store.finish(first)
    grade(store, "t0/0")
    looks = Sweep(grading_app(config), config)
    assert store.ungraded() == ["t0/1"]
    assert [looks.sweep(store) for _ in range(4)] == [0, 1, 0, 0]
    broker = redis.Redis(port=int(config.redis.url.rsplit(":")[-1].split("/")[0]), db=config.reward.database)
    assert broker.llen(grading_queue("test")) == 1
    grade(store, "t0/1")
    assert store.ungraded() == []


def test_a_redis_that_refuses_a_command_does_not_end_the_sweeps(
    redis_client: redis.Redis, config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sweep, "SWEEP_S", 0.05)
    config = config.model_copy(update={"run": RunConfig(name="refused")})  # its thread outlives this test
    store = GroupStore(redis_client, "refused")
    broker = redis.Redis(port=int(config.redis.url.rsplit(":")[-1].split("/")[0]), db=config.reward.database)
    redis_client.set(store.keys.states, "no hash")
    Sweep(grading_app(config), config).start()
    time.sleep(0.5)
    redis_client.delete(store.keys.states)
    store.feed(make_group("t0", samples=1))
    (lease,) = store.lease("worker", 1, 10)
    store.store(make_trajectory("t0"))
    store.finish(lease)
    wait_until(lambda: broker.llen(grading_queue("refused")) == 1, what="asked again")
