"""Normalisation and exact match against the golden vectors, and the one place where ours is stricter."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.reward.matching import exact_match, normalise

GOLDENS = Path(__file__).parents[1] / "goldens"
CASES = json.loads((GOLDENS / "answer_match.json").read_text())["cases"]


def golds_of(case: dict) -> list[str]:
    return [case["golds"]] if isinstance(case["golds"], str) else case["golds"]


@pytest.mark.parametrize("case", CASES, ids=[case["id"] for case in CASES])
def test_normal_forms_are_those_of_the_goldens(case: dict) -> None:
    assert normalise(case["prediction"]) == case["expected"]["normalized_prediction"]
    assert [normalise(gold) for gold in golds_of(case)] == case["expected"]["normalized_golds"]


@pytest.mark.parametrize("case", CASES, ids=[case["id"] for case in CASES])
def test_exact_match_is_that_of_the_goldens_unless_nothing_is_left_of_the_answer(case: dict) -> None:
    something_left = case["expected"]["normalized_prediction"] != ""
    assert exact_match(case["prediction"], golds_of(case)) == bool(case["expected"]["em"] and something_left)


def test_the_guard_against_empty_answers_makes_a_difference_in_the_goldens() -> None:
    differing = {c["id"] for c in CASES if c["expected"]["em"] and not exact_match(c["prediction"], golds_of(c))}
    assert differing == {"match-004", "match-019", "match-060", "match-061", "match-064"}


@given(st.text())
def test_normalising_leaves_no_space_to_trim_and_no_ascii_capital(text: str) -> None:
    normal = normalise(text)
    assert normal == " ".join(normal.split())
    assert not any("A" <= letter <= "Z" for letter in normal)


@given(st.text(), st.lists(st.text(), max_size=3))
def test_an_answer_matches_itself_wherever_it_stands_among_the_golds(answer: str, others: list[str]) -> None:
    if normalise(answer):
        assert exact_match(answer, [*others, answer])
        assert exact_match(f" The {answer}!", [answer, *others])


def test_no_golds_match_nothing() -> None:
    assert not exact_match("Paris", [])
