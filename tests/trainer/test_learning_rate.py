"""The learning rate over a run's steps."""

from __future__ import annotations

import pytest

from services.trainer.learning_rate import learning_rate, warmed_up


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
