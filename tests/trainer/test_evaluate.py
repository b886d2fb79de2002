"""An evaluation: the means of the reward's parts over the held-out questions, one that nobody could grade counted as wrong."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import msgspec
import pytest
import redis

from services.contract.config import Config
from services.contract.grading_tries import GradingTries
from services.contract.groups import GroupStore, Lease
from services.contract.messages import Question
from services.trainer.collect import Collector
from services.trainer.evaluate import Evaluator
from services.trainer.ledger import Evaluation
from tests.factories import grade, make_trajectory

PARTS = {"exact_match": 0.0, "sub_match": 1.0, "f1": 0.5, "format": 1.0}


def play(store: GroupStore) -> None:
    """As a worker and a grader do: the first question is graded, the second never can be."""
    leases: list[Lease] = []
    while len(leases) < 2:
        leases += store.lease("worker", 2, 100)
    for lease in leases:
        store.store(make_trajectory(lease.group.group_id))
        assert store.finish(lease)
    first, second = (lease.group.group_id for lease in leases)
    assert grade(store, f"{first}/0", 1.0, **PARTS)
    tries = GradingTries(store.client, "test")
    attempt = tries.begin(f"{second}/0", 1)
    assert attempt and tries.bury(attempt, "no such judge", 1)


def test_the_parts_of_the_reward_are_averaged_and_what_was_given_up_counts_as_wrong(
    redis_client: redis.Redis, tmp_path: Path
) -> None:
    store = GroupStore(redis_client, "test")
    questions = [Question(str(i), "capital", "What is the capital of France?", ["Paris"]) for i in range(2)]
    collector = Collector(store, timeout_s=30, check_stop=lambda: None)
    evaluator = Evaluator(Config(), store, collector, questions, tmp_path)
    worker = threading.Thread(target=play, args=[store])
    worker.start()
    evaluation = evaluator.evaluate("start", version=0, step=0)
    worker.join()
    assert (evaluation.questions, evaluation.exact_match, evaluation.sub_match, evaluation.f1) == (2, 0.0, 0.5, 0.25)
    assert evaluation.by_source["capital"]["f1"] == 0.25
    (row,) = [json.loads(line) for line in (tmp_path / "start-step000000.jsonl").read_text().splitlines()]
    assert row["parts"] == PARTS
    assert store.in_flight() == set()


@pytest.mark.parametrize("field", ["f1", "sub_match"])
def test_an_evaluation_of_an_older_ledger_can_be_read(field: str) -> None:
    older = {"label": "start", "version": 0, "step": 0, "questions": 1, "exact_match": 0.5, "format": 1.0, "searches": 1.0}
    older |= {"answered": 1.0, "by_source": {}, "seconds": 1.0}
    assert getattr(msgspec.convert(older, Evaluation), field) is None
