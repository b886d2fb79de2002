"""Which part of a page is returned."""

from __future__ import annotations

import random

from hypothesis import given
from hypothesis import strategies as st

from services.retriever.web.passage import Match, choose_passage, densest

FILLER = "The weather was fine and the road was long. " * 100
FACT = "Mount Kaputar in New South Wales rises 1489 metres."


def test_a_short_text_is_returned_whole() -> None:
    assert choose_passage("short text", "anything", 100) == "short text"


def test_the_passage_is_where_the_snippet_came_from() -> None:
    chosen = choose_passage(FILLER + FACT + FILLER, "... Kaputar ... rises 1489 metres ...", 200)
    assert FACT in chosen
    assert len(chosen) <= 200


def test_the_fact_stands_in_the_middle() -> None:
    chosen = choose_passage(FILLER + FACT + FILLER, "Kaputar New South Wales 1489", 400)
    assert abs(chosen.index("Kaputar") - 200) < 60


def test_rare_words_outweigh_frequent_ones() -> None:
    text = "the was and long " * 50 + FILLER + FACT
    assert "Kaputar" in choose_passage(text, "the weather was fine and Kaputar", 150)


def test_without_a_matching_word_it_is_the_beginning() -> None:
    assert choose_passage(FILLER, "zebra", 50) == "The weather was fine and the road was long. The"


def test_text_without_spaces_is_searched_by_characters() -> None:
    text = "天気が良かった。" * 100 + "富士山の高さは三七七六メートル。" + "道は長かった。" * 100
    assert "富士山の高さ" in choose_passage(text, "富士山 高さ", 40)


def test_words_are_not_split() -> None:
    words = set(FILLER.split())
    for size in range(20, 60):
        assert set(choose_passage(FILLER, "fine", size).split()) <= words


def test_one_endless_word_is_cut() -> None:
    assert choose_passage("x" * 10_000, "y", 100) == "x" * 100


@given(st.text(max_size=400), st.text(max_size=50), st.integers(1, 100))
def test_it_is_never_longer_than_asked_and_stands_in_the_text(text: str, clues: str, size: int) -> None:
    chosen = choose_passage(text, clues, size)
    assert len(chosen) <= size
    assert chosen in text


def test_the_densest_stretch_is_the_best_of_all_stretches() -> None:
    dice = random.Random(5)
    for _ in range(200):
        starts = sorted(dice.sample(range(300), 12))
        matches = [Match(dice.choice("abcd"), start, start + 1) for start in starts]
        assert densest(matches, 60) == _slow_densest(matches, 60)


def _slow_densest(matches: list[Match], size: int) -> tuple[int, int]:
    """Every stretch from one match to another, worth what the docstring of `choose_passage` says."""
    stretches = [(a, b) for a in range(len(matches)) for b in range(a, len(matches)) if matches[b].end - matches[a].start <= size]

    def key(stretch: tuple[int, int]) -> tuple[float, int, int]:
        a, b = stretch
        words = {match.word for match in matches[a : b + 1]}
        worth = sum(1 / sum(match.word == word for match in matches) for word in words)
        return (-round(worth, 9), matches[b].end - matches[a].start, matches[a].start)

    a, b = min(stretches, key=key)
    return matches[a].start, matches[b].end
