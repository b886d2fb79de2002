"""The learning rate over a run's steps."""

from __future__ import annotations

import pytest

from services.contract.config import TrainerConfig
from services.trainer.learning_rate import Rates, learning_rate, rates, warmed_up


def curve(schedule: str, steps: int = 6, warmup: int = 2, floor: float = 0.1) -> list[float]:
    return [round(learning_rate(s, steps, 1.0, warmup, schedule, floor), 6) for s in range(1, steps + 1)]  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("schedule", "wanted"),
    [
        ("constant", [0.333333, 0.666667, 1.0, 1.0, 1.0, 1.0]),
        ("linear", [0.333333, 0.666667, 1.0, 0.775, 0.55, 0.325]),
        ("cosine", [0.333333, 0.666667, 1.0, 0.868198, 0.55, 0.231802]),
    ],
)
def test_the_rate_warms_up_and_decays_towards_the_floor(schedule: str, wanted: list[float]) -> None:
    assert curve(schedule) == wanted


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_the_floor_is_reached_when_the_last_step_is_done_and_kept(schedule: str) -> None:
    assert learning_rate(7, 6, 1.0, 2, schedule, 0.1) == pytest.approx(0.1)  # type: ignore[arg-type]
    assert learning_rate(99, 6, 1.0, 2, schedule, 0.1) == pytest.approx(0.1)  # type: ignore[arg-type]


def test_a_constant_rate_is_the_warmed_up_one() -> None:
    assert [learning_rate(s, 3, 2e-5, 2, "constant", 0.0) for s in (1, 2, 3, 9)] == [warmed_up(2e-5, s, 2) for s in (1, 2, 3, 9)]


def test_without_warm_up_the_first_step_has_the_whole_rate() -> None:
    assert curve("linear", steps=2, warmup=0, floor=0.0) == [1.0, 0.5]


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_a_trial_no_longer_than_the_warm_up_stays_in_it(schedule: str) -> None:
    assert curve(schedule, steps=2, warmup=2, floor=0.1) == pytest.approx([warmed_up(1.0, s, 2) for s in (1, 2)])


def trainer(**changes: object) -> TrainerConfig:
    return TrainerConfig.model_validate({"steps": 6, "learning_rate": 1e-5, **changes})


def test_without_a_critic_there_is_the_policys_rate_alone() -> None:
    assert rates(3, trainer()) == Rates(1e-5) and rates(3, trainer()).figures == {"learning_rate": 1e-5}


def test_the_policys_curve_begins_after_the_critics_warm_up() -> None:
    critic = {"advantage": "gae", "critic_learning_rate": 4e-5, "critic_warmup_steps": 2}
    shape = {"schedule": "linear", "warmup_steps": 1, "min_learning_rate": 1e-6}
    with_critic, alone = trainer(objective=critic, **shape), trainer(**shape | {"steps": 4})
    found = [rates(step, with_critic) for step in range(1, 7)]
    assert [rate.policy for rate in found] == [None, None, *(rates(step, alone).policy for step in range(1, 5))]
    assert [rate.critic for rate in found] == pytest.approx([4 * (rates(s, trainer(**shape)).policy or 0) for s in range(1, 7)])
    assert found[0].figures == {"learning_rate": 0.0, "critic_learning_rate": found[0].critic}
