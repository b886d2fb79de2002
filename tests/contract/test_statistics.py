"""How sure a figure is: against published values, against brute force, and at the edges."""

from __future__ import annotations

import itertools
import random
from statistics import fmean

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.contract.statistics import bootstrap_p, ks_of, mcnemar, mean_interval, mean_of_independent, pass_at_k, wilson


@pytest.mark.parametrize(
    ("successes", "trials", "low", "high"),
    # scipy.stats.binomtest(successes, trials).proportion_ci(method="wilson")
    [(0, 10, 0.0, 0.277533), (5, 10, 0.236593, 0.763407), (111, 216, 0.447577, 0.579715), (10, 10, 0.722467, 1.0)],
)
def test_wilsons_interval_is_the_known_one(successes: int, trials: int, low: float, high: float) -> None:
    assert wilson(successes, trials) == pytest.approx((low, high), abs=1e-5)


def test_of_no_trials_nothing_is_known() -> None:
    assert wilson(0, 0) == (0.0, 1.0) and mean_interval([]) == (0.0, 0.0)


def test_the_mean_of_one_estimate_has_its_interval_and_of_several_a_narrower_one() -> None:
    assert mean_of_independent([(0.3, 0.2, 0.45)]) == pytest.approx((0.2, 0.45))
    assert mean_of_independent([(0.3, 0.2, 0.5)] * 4) == pytest.approx((0.25, 0.4))
    assert mean_of_independent([]) == (0.0, 0.0)


def test_the_interval_of_a_mean_of_shares_holds_the_true_mean_as_often_as_it_says() -> None:
    draw, sets = random.Random(0), [(0.05, 40), (0.4, 60), (0.15, 30)]
    held, truth = 0, fmean(share for share, _ in sets)
    for _ in range(1000):
        found = [(sum(draw.random() < share for _ in range(n)), n) for share, n in sets]
        low, high = mean_of_independent([(right / n, *wilson(right, n)) for right, n in found])
        held += low <= truth <= high
    assert 0.93 <= held / 1000 <= 0.98


@given(st.integers(1, 7).flatmap(lambda n: st.tuples(st.just(n), st.integers(0, n), st.integers(1, n))))
def test_pass_at_k_is_the_share_of_subsets_with_a_right_sample(case: tuple[int, int, int]) -> None:
    samples, right, k = case
    subsets = list(itertools.combinations([True] * right + [False] * (samples - right), k))
    assert pass_at_k(samples, right, k) == pytest.approx(fmean(any(subset) for subset in subsets))


@pytest.mark.parametrize("k", [0, 5])
def test_pass_at_k_of_fewer_samples_is_refused(k: int) -> None:
    with pytest.raises(ValueError, match="between 1 and the number of samples"):
        pass_at_k(4, 2, k)


@pytest.mark.parametrize(("samples", "ks"), [(1, []), (2, [1, 2]), (4, [1, 2, 4]), (6, [1, 2, 4, 6])])
def test_pass_is_told_for_powers_of_two_and_all_samples(samples: int, ks: list[int]) -> None:
    assert ks_of(samples) == ks


@pytest.mark.parametrize(("first", "second", "p"), [(16, 40, 0.00184), (0, 0, 1.0), (5, 5, 1.0), (0, 6, 0.03125)])
def test_mcnemar_is_exact(first: int, second: int, p: float) -> None:
    """16 against 40 are the quickstart's questions; scipy.stats.binomtest(16, 56).pvalue."""
    assert mcnemar(first, second) == mcnemar(second, first) == pytest.approx(p, abs=1e-5)


def test_the_bootstraps_interval_covers_the_mean_about_as_often_as_it_says() -> None:
    draw, covered = random.Random(0), 0
    for seed in range(100):
        low, high = mean_interval([draw.random() for _ in range(40)], seed)
        covered += low <= 0.5 <= high
    assert 88 <= covered <= 100


def test_of_many_questions_the_interval_is_the_normal_one() -> None:
    values = [random.Random(i).random() for i in range(2500)]
    low, high = mean_interval(values)
    assert high - low == pytest.approx(2 * 1.96 * (1 / 12) ** 0.5 / 50, rel=0.05)


def test_a_difference_is_found_where_there_is_one_and_not_where_there_is_none() -> None:
    draw = random.Random(1)
    noise = [draw.gauss(0, 1) for _ in range(200)]
    centred = [value - fmean(noise) for value in noise]
    assert bootstrap_p([value + 0.5 for value in centred]) < 0.01
    assert bootstrap_p(centred) > 0.9
    assert bootstrap_p([0.0] * 5) == 1.0 and bootstrap_p([]) == 1.0
    assert bootstrap_p([draw.gauss(0.5, 1) for _ in range(3000)]) < 1e-6


def test_the_same_answers_give_the_same_interval() -> None:
    values = [random.Random(3).random() for _ in range(30)]
    assert mean_interval(values) == mean_interval(values) and bootstrap_p(values) == bootstrap_p(values)
