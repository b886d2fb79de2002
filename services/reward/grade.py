"""The reward of one trajectory: a pure function of what the model wrote, the golden answers and the `[reward]` section.

| the trajectory                      | reward                |
|-------------------------------------|-----------------------|
| its answer matches a gold           | `reward.correct`      |
| no match, but the format is kept    | `reward.format_bonus` |
| anything else                       | 0                     |

Observations are never read: an answer that stands in a retrieved passage is not the model's.
"""

from __future__ import annotations

from typing import NamedTuple

from services.contract.config import RewardConfig
from services.contract.messages import Trajectory
from services.contract.transcript import last_answer
from services.reward.format import keeps_format
from services.reward.matching import exact_match


class Grade(NamedTuple):
    reward: float
    parts: dict[str, float]
    """exact_match, format and answered as 0 or 1; searches as a count."""


def grade(trajectory: Trajectory, config: RewardConfig) -> Grade:
    """Grade the last answer block that lies inside one model span. Same input, same grade."""
    turns = [span.text for span in trajectory.spans if span.kind == "model"]
    answer = last_answer(turns)
    matches = answer is not None and exact_match(answer, trajectory.golden_answers)
    in_format = keeps_format(turns, config.require_think)
    reward = config.correct if matches else config.format_bonus if in_format else 0.0
    parts = {
        "exact_match": float(matches),
        "format": float(in_format),
        "searches": float(trajectory.searches),
        "answered": float(answer is not None),
    }
    return Grade(float(reward), parts)
