"""Early signs that a policy is collapsing: rules over the steps so far. Pure: rows of the journal in, sentences out.

`start` is the median of a figure's first five values, `recent` the mean of its last three.

| sign        | figure                            | shows when                           | why look                              |
|-------------|-----------------------------------|--------------------------------------|---------------------------------------|
| mismatch    | mismatch/k3                       | recent > 0.01                        | the gradient is of another policy     |
| entropy     | objective/entropy, else           | recent < 0.3 × start                 | the same is sampled again and again   |
|             | objective/negative_logprob        |                                      |                                       |
| thoughts    | search/thought_tokens             | recent < 0.25 × start, start ≥ 8     | reasoning that earns nothing is shed  |
| searches    | search/per_episode                | recent < 0.2 × start, start ≥ 0.3    | it answers from memory                |
| no_variance | reward/zero_variance              | recent ≥ 0.9                         | nothing is left to learn from         |
| format      | reward/format                     | recent < start - 0.15                | the protocol is being unlearned       |
| length      | search/model_tokens               | recent > 2.5 × start, start ≥ 8      | rambling, often before format breaks  |
| truncation  | search/truncated                  | recent > start + 0.25                | episodes are cut before they answer   |
| clipping    | objective/clip_fraction           | recent > 0.3                         | steps too large for the old policy    |
| importance  | mismatch/importance_clip_fraction | recent > 0.1                         | engine and trainer drift apart        |
| gradient    | objective/grad_norm               | last > 5 × the median of 8 before    | one bad batch, or a divergence begins |

What to do is `advice` of each (SIGNS). Thresholds are rules of thumb; a sign is a reason to look, and stops nothing. A figure that
the rows lack says nothing. `recent` needs six steps where it is compared with the start, three where not; the gradient four before.

A sign is told at its *onset*: it shows now and after none of the five steps before.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, median
from typing import Any

STARTING, RECENT, SPIKE_WINDOW, QUIET = 5, 3, 8, 5

Check = Callable[[list[float]], str | None]
"""A figure's values, oldest first -> how it looks, in words, if the sign shows after the last of them."""


@dataclass(frozen=True)
class Sign:
    name: str
    figures: tuple[str, ...]
    """The first of them that the rows have is looked at."""
    check: Check
    advice: str


def below_start(share: float, least: float) -> Check:
    def check(values: list[float]) -> str | None:
        start, recent = _start(values), _recent(values)
        if len(values) <= STARTING or start < least or recent >= share * start:
            return None
        return f"{recent:.3g}, below {share:.0%} of the {start:.3g} it began with"

    return check


def above_start(times: float, least: float) -> Check:
    def check(values: list[float]) -> str | None:
        start, recent = _start(values), _recent(values)
        if len(values) <= STARTING or start < least or recent <= times * start:
            return None
        return f"{recent:.3g}, above {times:g} times the {start:.3g} it began with"

    return check


def moved(change: float) -> Check:
    """change: how far it must have fallen (negative) or risen (positive) from the start."""

    def check(values: list[float]) -> str | None:
        start, recent = _start(values), _recent(values)
        if len(values) <= STARTING or (recent - start) / change <= 1:
            return None
        return f"{recent:.3g}, {abs(recent - start):.2g} {'below' if change < 0 else 'above'} the {start:.3g} it began with"

    return check


def above(limit: float) -> Check:
    def check(values: list[float]) -> str | None:
        return f"{_recent(values):.3g}, above {limit:g}" if len(values) >= RECENT and _recent(values) > limit else None

    return check


def at_least(limit: float) -> Check:
    def check(values: list[float]) -> str | None:
        return f"{_recent(values):.3g}, {limit:g} or more" if len(values) >= RECENT and _recent(values) >= limit else None

    return check


def spike(times: float) -> Check:
    def check(values: list[float]) -> str | None:
        before = [value for value in values[-SPIKE_WINDOW - 1 : -1] if value > 0]  # 0: no step was made, a critic learned alone
        if len(before) < SPIKE_WINDOW // 2 or values[-1] <= times * median(before):
            return None
        return f"{values[-1]:.3g}, {times:g} times the {median(before):.3g} of the steps before or more"

    return check


SIGNS = (
    Sign("mismatch", ("mismatch/k3",), above(0.01), "compare engine's and trainer's dtypes and kernels; see objective.importance"),
    Sign(
        "entropy",
        ("objective/entropy", "objective/negative_logprob"),
        below_start(0.3, least=0.0),
        "lower learning_rate, raise objective.clip_high, or set objective.entropy_coef",
    ),
    Sign("thoughts", ("search/thought_tokens",), below_start(0.25, least=8), "ask for thoughts by reward.require_think"),
    Sign("searches", ("search/per_episode",), below_start(0.2, least=0.3), "read transcripts: does the retriever find anything?"),
    Sign("no_variance", ("reward/zero_variance",), at_least(0.9), "take harder questions, more samples, or dynamic_sampling"),
    Sign("format", ("reward/format",), moved(-0.15), "lower learning_rate, or pay the format: reward.structure_format_score"),
    Sign("length", ("search/model_tokens",), above_start(2.5, least=8), "read transcripts; set objective.overlong_tokens"),
    Sign(
        "truncation", ("search/truncated",), moved(0.25), "raise rollout.max_turn_tokens or max_response_tokens, or punish length"
    ),
    Sign("clipping", ("objective/clip_fraction",), above(0.3), "lower learning_rate, or take fewer epochs and minibatches"),
    Sign("importance", ("mismatch/importance_clip_fraction",), above(0.1), "lower trainer.max_staleness; look at mismatch/k3"),
    Sign("gradient", ("objective/grad_norm",), spike(5.0), "read the step's transcripts; lower clip_grad or learning_rate"),
)


def showing(rows: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """The signs that show after the last row, each with a sentence. rows: of GRPO steps, oldest first."""
    found = {}
    for sign in SIGNS:
        figure = next((name for name in sign.figures if rows and name in rows[-1]), None)
        values = [float(row[figure]) for row in rows if figure in row] if figure else []
        if values and (words := sign.check(values)):
            found[sign.name] = f"{figure} is {words}: {sign.advice}"
    return found


def onsets(rows: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Those that show now and after none of the QUIET steps before."""
    before = {name for back in range(1, QUIET + 1) for name in showing(rows[:-back])}
    return {name: sentence for name, sentence in showing(rows).items() if name not in before}


def warning_metrics(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """`warnings/<sign>`: 1 while it shows, else 0; `warnings/showing` how many do."""
    now = showing(rows)
    return {f"warnings/{sign.name}": float(sign.name in now) for sign in SIGNS} | {"warnings/showing": float(len(now))}


def _start(values: list[float]) -> float:
    return median(values[:STARTING])


def _recent(values: list[float]) -> float:
    return fmean(values[-RECENT:])
