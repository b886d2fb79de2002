"""A group as the learner gets it: a sample that failed has no say in its group's baseline."""

from __future__ import annotations

import msgspec
import pytest

from services.contract.messages import PromptGroup
from services.rollout.worker import failed_sample
from services.trainer.feeding.collect import CompleteGroup
from services.trainer.rows import policy_rows
from tests.factories import make_complete_group, make_group


def with_failed(rewards: list[float]) -> CompleteGroup:
    """A group of which one more sample was not there in time."""
    whole, group = make_complete_group("t0", rewards), _fed(len(rewards) + 1)
    failed = msgspec.structs.replace(failed_sample(group, len(rewards), [1, 2, 3]), reward=0.0)
    return CompleteGroup("t0", [*whole.trajectories, failed], whole.entry_ids)


def _fed(samples: int) -> PromptGroup:
    return make_group("t0", samples)


@pytest.mark.parametrize(("rewards", "mean"), [([1.0, 0.0], 0.5), ([1.0, 1.0, 0.4], 0.8)])
def test_a_failed_sample_takes_the_mean_of_the_others(rewards: list[float], mean: float) -> None:
    assert with_failed(rewards).rewards == [*rewards, pytest.approx(mean)]


def test_a_failed_sample_is_a_row_without_a_token_to_train_on() -> None:
    row = policy_rows([with_failed([1.0, 0.0])])[-1]
    assert (row.token_ids, row.loss_mask, row.targets) == ([1, 2, 3], [], [])


def test_a_group_of_nothing_but_failures_has_no_reward() -> None:
    group = with_failed([])
    assert group.rewards == [0.0]
