"""The order of a push and its trainer's lease, against a real Redis."""

from __future__ import annotations

import msgspec
import pytest
import redis

from services.contract.policy import PolicyBoard
from services.contract.push import BucketLayout, Push, PushBoard, WeightGroup
from tests.reward.conftest import wait_until

GROUP = WeightGroup("weights-1", "127.0.0.1", 1234, "gloo", {"e0": 1, "e1": 3}, 4)
PUSH = Push(7, "join", GROUP, [BucketLayout(["a", "b"], ["float32"] * 2, [[2, 3], [4]])], {"a": "0123456789abcdef"})


@pytest.fixture
def pushes(redis_client: redis.Redis) -> PushBoard:
    return PolicyBoard(redis_client, "test").pushes


def test_without_an_order_there_is_no_push(pushes: PushBoard) -> None:
    assert pushes.alive() is None and pushes.last_version() == 0


def test_an_ordered_push_is_read_as_it_was_written(pushes: PushBoard) -> None:
    pushes.order(PUSH, 5)
    assert pushes.alive() == PUSH
    send = msgspec.structs.replace(PUSH, order="send")
    pushes.order(send, 5)
    assert pushes.alive() == send


def test_a_push_whose_trainer_falls_silent_is_over_and_cannot_be_renewed(pushes: PushBoard) -> None:
    pushes.order(PUSH, 0.1)
    wait_until(lambda: pushes.alive() is None, 5)
    assert not pushes.renew(5) and pushes.alive() is None


def test_a_renewed_lease_lasts(pushes: PushBoard) -> None:
    pushes.order(PUSH, 1)
    assert pushes.renew(60)
    assert pushes.client.pttl(pushes.keys.push_lease) > 50_000


def test_a_push_that_was_ended_is_over_but_its_number_stays_taken(pushes: PushBoard) -> None:
    pushes.order(PUSH, 5)
    pushes.end()
    assert pushes.alive() is None and pushes.last_version() == 7
