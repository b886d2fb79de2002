"""What is taken off a reward for length."""

from __future__ import annotations

import pytest

from services.contract.config import ObjectiveConfig
from services.trainer.shaping import overlong_penalty, shaped_rewards
from tests.factories import make_complete_group


@pytest.mark.parametrize(("tokens", "penalty"), [(0, 0.0), (60, 0.0), (70, -0.25), (90, -0.75), (100, -1.0), (500, -1.0)])
def test_the_penalty_grows_over_the_buffer(tokens: int, penalty: float) -> None:
    assert overlong_penalty(tokens, limit=100, buffer=40) == pytest.approx(penalty)


def test_only_the_models_own_tokens_count() -> None:
    """The factory's trajectories have four of them, and three observed ones."""
    o = ObjectiveConfig(overlong_tokens=6, overlong_buffer=4, overlong_penalty=0.5)
    assert shaped_rewards(make_complete_group("t0", [1.0, 0.0]), o) == [0.75, -0.25]


def test_without_a_limit_rewards_stay_as_they_are() -> None:
    assert shaped_rewards(make_complete_group("t0", [1.0, 0.0]), ObjectiveConfig()) == [1.0, 0.0]
