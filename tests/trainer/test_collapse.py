"""Early signs of collapse: each on a curve that collapses, none on one that does not, and what a real run showed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from services.trainer.monitoring.collapse import QUIET, SIGNS, onsets, showing, warning_metrics

COLLAPSES: dict[str, tuple[str, list[float]]] = {
    "mismatch": ("mismatch/k3", [1e-4] * 5 + [0.02] * 3),
    "entropy": ("objective/negative_logprob", [1.0] * 5 + [0.2] * 3),
    "thoughts": ("search/thought_tokens", [40.0] * 5 + [5.0] * 3),
    "searches": ("search/per_episode", [1.5] * 5 + [0.1] * 3),
    "no_variance": ("reward/zero_variance", [0.5] * 5 + [0.95] * 3),
    "format": ("reward/format", [0.95] * 5 + [0.7] * 3),
    "length": ("search/model_tokens", [50.0] * 5 + [180.0] * 3),
    "truncation": ("search/truncated", [0.05] * 5 + [0.4] * 3),
    "clipping": ("objective/clip_fraction", [0.02] * 5 + [0.5] * 3),
    "importance": ("mismatch/importance_clip_fraction", [0.0] * 5 + [0.2] * 3),
    "gradient": ("objective/grad_norm", [1.0] * 7 + [9.0]),
}
RUNS = {
    "well": Path(__file__).parents[2] / "docs" / "quickstart-run" / "metrics.jsonl",
    "format_lost": Path(__file__).with_name("recorded") / "format_lost.jsonl",
}
"""Whole runs of the quickstart: today's, and one under earlier settings whose policy forgot how to answer."""


def curve(figure: str, values: list[float]) -> list[dict[str, float]]:
    return [{figure: value} for value in values]


def test_every_sign_has_a_curve_here() -> None:
    assert [sign.name for sign in SIGNS] == list(COLLAPSES)


@pytest.mark.parametrize("name", COLLAPSES)
def test_a_collapse_is_told_once_with_its_figure(name: str) -> None:
    figure, values = COLLAPSES[name]
    rows = curve(figure, values)
    told = [(step, found) for step in range(1, len(rows) + 1) for found in onsets(rows[:step]).items()]
    assert [(sign, sentence.split()[0]) for _, (sign, sentence) in told] == [(name, figure)]
    assert told[0][0] > 5, "not before it happened"


@pytest.mark.parametrize("name", COLLAPSES)
def test_a_curve_that_stays_as_it_began_is_not_told_of(name: str) -> None:
    figure, values = COLLAPSES[name]
    assert showing(curve(figure, [values[0]] * 20)) == {}


def test_an_improvement_is_no_sign() -> None:
    rising = [0.2 + 0.03 * step for step in range(20)]
    for figure in ("reward/format", "search/per_episode", "objective/negative_logprob"):
        assert showing(curve(figure, rising)) == {}
    falling = list(reversed(rising))
    for figure in ("search/truncated", "objective/grad_norm", "reward/zero_variance"):
        assert showing(curve(figure, falling)) == {}


def test_a_sign_that_goes_and_comes_back_is_told_again_only_after_some_quiet_steps() -> None:
    up, down = [0.95] * 3, [0.1] * 3
    short = curve("reward/zero_variance", [*up, 0.1, *up])
    long = curve("reward/zero_variance", [*up, *down * (QUIET // 3 + 2), *up])
    assert onsets(short) == {} and "no_variance" in showing(short)
    assert "no_variance" in onsets(long)


def test_the_entropy_itself_is_looked_at_where_it_is_known() -> None:
    rows = [{"objective/entropy": 1.0, "objective/negative_logprob": v} for v in [1.0] * 5 + [0.1] * 3]
    assert showing(rows) == {}


def test_the_first_step_after_the_critics_warm_up_is_no_spike() -> None:
    assert showing(curve("objective/grad_norm", [0.0] * 6 + [1.0])) == {}


def test_a_policy_that_never_thought_cannot_stop() -> None:
    assert showing(curve("search/thought_tokens", [3.0] * 5 + [0.0] * 5)) == {}


def test_a_figure_that_is_missing_or_new_says_nothing() -> None:
    assert showing([]) == {} and showing([{}]) == {} and showing([{}] * 5 + curve("reward/format", [0.1])) == {}


def test_the_steps_row_says_which_signs_show() -> None:
    figure, values = COLLAPSES["format"]
    found = warning_metrics(curve(figure, values))
    assert found["warnings/format"] == 1 and found["warnings/showing"] == 1 and found["warnings/gradient"] == 0
    assert len(found) == len(SIGNS) + 1


@pytest.mark.parametrize(("run", "told"), [("well", set()), ("format_lost", {(13, "format")})])
def test_of_two_real_runs_the_one_that_went_wrong_is_told_of(run: str, told: set[tuple[int, str]]) -> None:
    """From step 12 on the policy of `format_lost` asks for another search where it must answer."""
    rows = [row for line in RUNS[run].read_text().splitlines() if (row := json.loads(line))["kind"] == "grpo"]
    assert {(step, sign) for step in range(1, len(rows) + 1) for sign in onsets(rows[:step])} == told
