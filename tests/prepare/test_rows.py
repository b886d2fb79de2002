"""Rows that the user brings: every mistake is told with file and line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from services.prepare.errors import PrepareError
from services.prepare.rows import check_corpus, check_demonstrations, check_questions

PASSAGE = {"id": "1", "contents": '"T"\ntext'}
QUESTION = {"id": "1", "source": "s", "question": "Why?", "golden_answers": ["so"]}
MODEL = {"kind": "model", "text": "<answer>so</answer>"}
DEMONSTRATION = {"example_id": "s:1", "question": "Why?", "segments": [MODEL]}


def write(path: Path, *rows: object) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


@pytest.mark.parametrize(
    ("check", "good", "bad", "reason"),
    [
        (check_corpus, PASSAGE, {"id": "2"}, "contents"),
        (check_corpus, PASSAGE, {"id": "2", "contents": " "}, "empty"),
        (check_corpus, PASSAGE, "not json", "JSON"),
        (check_corpus, PASSAGE, "", "JSON"),
        (check_questions, QUESTION, {**QUESTION, "golden_answers": "so"}, "golden_answers"),
        (check_questions, QUESTION, {**QUESTION, "id": "2", "golden_answers": []}, "at least one answer"),
        (check_questions, QUESTION, {**QUESTION, "id": "2", "golden_answers": ["", "a"]}, "none may be empty"),
        (check_questions, QUESTION, {**QUESTION, "id": 2}, "Expected `str`"),
        (check_questions, QUESTION, {**QUESTION, "id": "2", "question": ""}, "`question` is empty"),
        (check_questions, QUESTION, QUESTION, "stands there twice"),
        (check_demonstrations, DEMONSTRATION, {**DEMONSTRATION, "segments": []}, "begin and end"),
        (check_demonstrations, DEMONSTRATION, {**DEMONSTRATION, "segments": [{"kind": "model", "text": "x"}]}, "no <answer>"),
        (check_demonstrations, DEMONSTRATION, {**DEMONSTRATION, "segments": [{"kind": "user", "text": "x"}]}, "kind"),
    ],
)
def test_a_bad_row_is_told_with_file_and_line(
    tmp_path: Path, check: Callable[[Path, str], int], good: object, bad: object, reason: str
) -> None:
    path = write(tmp_path / "rows.jsonl", good, bad)
    with pytest.raises(PrepareError) as error:
        check(path, "data.x")
    assert str(error.value).startswith(f"{path}:2: ")
    assert reason in str(error.value)


@pytest.mark.parametrize(
    ("check", "row"),
    [(check_corpus, PASSAGE), (check_questions, QUESTION), (check_demonstrations, DEMONSTRATION)],
)
def test_good_rows_are_counted(tmp_path: Path, check: Callable[[Path, str], int], row: object) -> None:
    assert check(write(tmp_path / "rows.jsonl", row), "data.x") == 1


def test_bytes_that_are_no_text_are_told(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"id": "1", "contents": "\xff"}\n')
    with pytest.raises(PrepareError, match=r"rows.jsonl:1: "):
        check_corpus(path, "data.corpus")


def test_an_empty_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PrepareError, match="data.corpus: .* is empty"):
        check_corpus(write(tmp_path / "rows.jsonl"), "data.corpus")
