"""The reward of one trajectory: a pure function of its texts, the golden answers and the `[reward]` section.

| the answer is | the format is | it earns                                                                                |
|---------------|---------------|-----------------------------------------------------------------------------------------|
| right         | kept          | `correct`                                                                               |
| right         | broken        | `correct` - `structure_format_score`                                                    |
| wrong         | kept          | `structure_format_score`, and `retrieval_score` if a gold stands in a retrieved passage |
| wrong         | broken        | `final_format_score`                                                                    |
| missing       | broken        | 0                                                                                       |
| never asked   | -             | 0: a sample that failed holds no turn, no rule and no function is asked about it        |

The table is Search-R1's. `reward.match` says what right means; under "f1" an answer is right to a share between 0 and 1, and
earns that share of the way from its wrong row to its right one. A missing answer always breaks the format.

Answer and format are read from the model's own turns, retrieval from the passages it was shown. With `reward.legacy` the table
is fed with what the originals would have read (legacy.py), and the parts beside the reward say both.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from types import MappingProxyType
from typing import NamedTuple

from services.contract.config import RewardConfig
from services.contract.messages import Trajectory
from services.contract.transcript import SEARCH_R1, Layout
from services.reward import legacy
from services.reward.episode import Episode, episode_of
from services.reward.format import keeps_format
from services.reward.matching import exact_match, f1, sub_match

MATCH_PART = {"exact": "exact_match", "sub": "sub_match", "f1": "f1"}
BUILT_IN = frozenset({"exact_match", "sub_match", "f1", "format", "retrieval", "searches", "answered"})
Function = Callable[[Episode], "Grade"]
"""A reward of one's own: see function.py."""


class Grade(NamedTuple):
    reward: float
    parts: dict[str, float]
    """exact_match, sub_match, f1, format, retrieval, answered from 0 to 1; searches as a count; those of legacy or function."""


def grade(trajectory: Trajectory, config: RewardConfig, function: Function | None = None, layout: Layout = SEARCH_R1) -> Grade:
    """The same trajectory earns the same every time, unless a `function` decides otherwise. `layout` is how passages were shown.

    Raises UngradableTrajectory when legacy rules are asked for and the prompt's text is not there, and what `function` raises.
    """
    episode = episode_of(trajectory, layout)
    parts = built_in_parts(episode, config.require_think)
    if trajectory.status == "failed":
        return Grade(0.0, parts)
    if config.legacy:
        verdict = legacy.judge(trajectory, config.match)
        return Grade(pay(config, *verdict), parts | legacy.parts_of(verdict))
    reward = pay(config, parts[MATCH_PART[config.match]], episode.answer is not None, parts["format"] == 1, parts["retrieval"] == 1)
    if function is None:
        return Grade(reward, parts)
    decided = function(replace(episode, reward=reward, parts=MappingProxyType(parts)))
    return Grade(decided.reward, parts | decided.parts)


def built_in_parts(episode: Episode, require_think: bool) -> dict[str, float]:
    """Every figure that the built-in rules know, whichever of them the reward uses."""
    answer, golds = episode.answer or "", episode.golden_answers
    return {
        "exact_match": exact_match(answer, golds),
        "sub_match": sub_match(answer, golds),
        "f1": f1(answer, golds),
        "format": float(keeps_format(episode.turns, require_think)),
        "retrieval": float(any(sub_match(f"{passage.title} {passage.text}", golds) for passage in episode.passages)),
        "searches": float(episode.searches),
        "answered": float(episode.answer is not None),
    }


def pay(config: RewardConfig, match: float, answered: bool, in_format: bool, retrieved: bool) -> float:
    """The module's table; `match` is the share to which the answer is right."""
    if in_format:
        right, wrong = config.correct, config.structure_format_score + config.retrieval_score * retrieved
    else:
        right, wrong = config.correct - config.structure_format_score, config.final_format_score * answered
    return match * right + (1 - match) * wrong
