"""Normalisation, exact match and sub-match against the golden vectors, F1 by example, and the one place where ours is stricter."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.reward.matching import exact_match, f1, normalise, sub_match
from tests.reward.goldens import golden_cases

CASES = golden_cases("answer_match")


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


@pytest.mark.parametrize("case", CASES, ids=[case["id"] for case in CASES])
def test_sub_match_is_that_of_the_goldens_unless_nothing_is_left_of_the_gold(case: dict) -> None:
    golds = [gold for gold in golds_of(case) if normalise(gold)]
    emptied = len(golds) < len(golds_of(case))
    if not emptied:
        assert sub_match(case["prediction"], golds) == case["expected"]["subem"]
    assert sub_match(case["prediction"], golds_of(case)) == sub_match(case["prediction"], golds)


def test_a_gold_of_which_nothing_is_left_stands_nowhere() -> None:
    differing = {c["id"] for c in CASES if c["expected"]["subem"] and not sub_match(c["prediction"], golds_of(c))}
    assert {"match-004", "match-019"} < differing
    assert sub_match("Paris", ["the", ""]) == 0.0


@pytest.mark.parametrize(
    ("answer", "golds", "score"),
    [
        ("Paris", ["Paris"], 1.0),
        ("the Paris!", ["paris"], 1.0),
        ("Paris, France", ["Paris"], 2 / 3),  # precision 1/2, recall 1
        ("Paris", ["Paris in France"], 1 / 2),  # precision 1, recall 1/3
        ("New York", ["York New"], 1.0),  # the order of words does not count
        ("no no yes", ["no yes"], 4 / 5),  # a word counts as often as it stands in both
        ("Rome", ["Paris"], 0.0),
        ("Paris France", ["Rome", "Paris", "Paris France Europe"], 4 / 5),  # the best gold
        ("the", ["the"], 0.0),
        ("", [""], 0.0),
        ("Paris", [], 0.0),
    ],
)
def test_f1_is_that_of_squad(answer: str, golds: list[str], score: float) -> None:
    assert f1(answer, golds) == pytest.approx(score)


@given(st.text(alphabet="ab c"), st.lists(st.text(alphabet="ab c"), max_size=3))
def test_an_exact_match_is_a_sub_match_and_a_full_f1(answer: str, golds: list[str]) -> None:
    assert 0.0 <= f1(answer, golds) <= 1.0
    if exact_match(answer, golds):
        assert sub_match(answer, golds) == f1(answer, golds) == 1.0


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
