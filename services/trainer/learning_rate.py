"""The learning rate of a step: linear warm-up, then constant or a decay to a floor over the run's steps."""

from __future__ import annotations

import math
from typing import Literal

Schedule = Literal["constant", "linear", "cosine"]


def warmed_up(rate: float, step: int, warmup_steps: int) -> float:
    """Linear warm-up over the first `warmup_steps` steps (counted from 1), then constant."""
    return rate * min(1.0, step / (warmup_steps + 1))


def learning_rate(step: int, steps: int, rate: float, warmup_steps: int, schedule: Schedule, floor: float) -> float:
    """The rate of step `step`, counted from 1, of a run of `steps`.

    The first step after the warm-up has the whole rate; the decay reaches `floor` when the last step is done.
    With p the share of the steps after the warm-up that are done: linear floor + (rate - floor)·(1 - p), cosine
    floor + (rate - floor)·(1 + cos πp)/2. A run whose `steps` was raised goes on along the longer curve.
    """
    if schedule == "constant" or step <= warmup_steps:
        return warmed_up(rate, step, warmup_steps)
    done = min(1.0, (step - 1 - warmup_steps) / (steps - warmup_steps))
    left = 1 - done if schedule == "linear" else (1 + math.cos(math.pi * done)) / 2
    return floor + (rate - floor) * left
