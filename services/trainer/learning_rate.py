"""The learning rate of a step: linear warm-up, then constant or a decay to a floor over the run's steps."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from services.contract.config import TrainerConfig

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
    done = min(1.0, (step - 1 - warmup_steps) / max(1, steps - warmup_steps))
    left = 1 - done if schedule == "linear" else (1 + math.cos(math.pi * done)) / 2
    return floor + (rate - floor) * left


@dataclass(frozen=True)
class Rates:
    """Of one batch's optimizer steps."""

    policy: float | None
    """None: the policy stays as it is."""
    critic: float | None = None
    """None: there is no critic."""

    @property
    def figures(self) -> dict[str, float]:
        return {"learning_rate": self.policy or 0.0} | ({"critic_learning_rate": self.critic} if self.critic else {})


def rates(step: int, trainer: TrainerConfig) -> Rates:
    """The rates of step `step`, counted from 1. Policy and critic go along curves of one shape: the critic's begins with step 1
    and is to `critic_learning_rate` what the policy's is to `learning_rate`, the policy's begins after the critic's warm-up."""
    o, alone = trainer.objective, trainer.objective.critic_warmup_steps

    def along(done: int, scale: float) -> float:
        schedule = trainer.warmup_steps, trainer.schedule, scale * trainer.min_learning_rate
        return learning_rate(step - done, trainer.steps - done, scale * trainer.learning_rate, *schedule)

    policy = along(alone, 1.0) if step > alone else None
    return Rates(policy, along(0, o.critic_learning_rate / trainer.learning_rate) if o.has_critic else None)
