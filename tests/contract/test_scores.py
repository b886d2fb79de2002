"""Scores are made of answers alone: means over questions, pass@k, intervals, by kind; the answers' file survives a crash."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from services.contract.scores import (
    FIGURES,
    Answer,
    append_lines,
    by_source,
    figures_of,
    kind_row,
    read_answers,
    score,
    write_lines,
)


def sample(**changes: float) -> dict[str, float]:
    return dict.fromkeys(FIGURES, 0.0) | changes


def test_a_question_counts_once_however_many_samples_it_has() -> None:
    scores = score([[sample(exact_match=1), sample(exact_match=1)], [sample(exact_match=0), sample(exact_match=1)]])
    assert scores.questions == 2 and scores.figures["exact_match"] == 0.75
    assert (scores.figures["pass@1"], scores.figures["pass@2"]) == (0.75, 1.0)


def test_one_sample_has_wilsons_interval_and_no_pass_at_k() -> None:
    scores = score([[sample(exact_match=float(i < 5))] for i in range(10)])
    assert scores.intervals["exact_match"] == (0.2366, 0.7634)
    assert not [name for name in scores.figures if name.startswith("pass@")]


def test_f1_has_an_interval_around_its_mean() -> None:
    scores = score([[sample(f1=i / 20)] for i in range(20)])
    low, high = scores.intervals["f1"]
    assert low < scores.figures["f1"] == 0.475 < high


def test_kinds_are_scored_apart() -> None:
    kinds = by_source([("b", [sample(exact_match=1)]), ("a", [sample()]), ("b", [sample()])])
    assert list(kinds) == ["a", "b"] and kinds["b"].figures["exact_match"] == 0.5
    assert kind_row(kinds["b"])["questions"] == 2 and kind_row(kinds["b"])["exact_match_high"] > 0.5


def test_no_question_has_no_score_but_an_answer() -> None:
    assert score([]).questions == 0 and score([]).figures["exact_match"] == 0.0


@pytest.mark.parametrize(("searches", "may_search", "answered"), [(1, True, 1.0), (0, True, 0.0), (0, False, 1.0)])
def test_an_answer_without_a_search_counts_as_answered_only_where_none_was_allowed(
    searches: int, may_search: bool, answered: float
) -> None:
    answer = Answer("g/0", "capital", "Q?", {"exact_match": 1.0}, searches, "Paris")
    assert figures_of(answer, may_search)["answered"] == answered
    assert figures_of(answer)["exact_match"] == 1.0 and figures_of(None) == sample()


def test_a_torn_line_is_left_out_and_what_is_added_after_it_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "answers.jsonl"
    lines = [msgspec.json.encode(Answer(f"g{i}/0", "capital", "Q?")) for i in range(3)]
    assert read_answers(path) == []
    write_lines(path, lines[:2])
    with path.open("ab") as file:
        file.write(lines[2][:20])
    kept = read_answers(path)
    write_lines(path, [line for _, line in kept])
    append_lines(path, [lines[2]])
    assert [answer.group_id for answer, _ in read_answers(path)] == ["g0", "g1", "g2"]
