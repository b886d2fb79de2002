"""JSONL by memory map: rows, bytes, and errors that name file and line."""

import json
from pathlib import Path

import pytest

from services.retriever.corpus import Corpus
from services.retriever.errors import CorpusError

GOOD = '{"id": "1", "contents": "\\"T\\"\\ntext"}'


def corpus_of(folder: Path, text: str | bytes) -> Path:
    path = folder / "corpus.jsonl"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def test_rows_keep_every_column_and_their_order(tmp_path: Path) -> None:
    rows = [{"id": str(n), "contents": f"passage {n} é", "url": [n, None]} for n in range(50)]
    corpus = Corpus.open(corpus_of(tmp_path, "\n".join(json.dumps(row) for row in rows)))
    assert len(corpus) == 50
    assert [corpus[n] for n in range(50)] == rows


@pytest.mark.parametrize("ending", ["", "\n", "\r\n"])
def test_last_line_counts_once_however_it_ends(tmp_path: Path, ending: str) -> None:
    corpus = Corpus.open(corpus_of(tmp_path, f"{GOOD}\n{GOOD}{ending}"))
    assert len(corpus) == 2
    assert corpus[1]["id"] == "1"


def test_line_is_served_byte_for_byte(tmp_path: Path) -> None:
    line = b'{"id": 7,  "contents": "x", "score": 1.50}'
    assert Corpus.open(corpus_of(tmp_path, line + b"\n")).line(0) == line


@pytest.mark.parametrize("row", [-1, 2, 10**9])
def test_row_outside_the_corpus_is_an_index_error(tmp_path: Path, row: int) -> None:
    corpus = Corpus.open(corpus_of(tmp_path, f"{GOOD}\n{GOOD}\n"))
    with pytest.raises(IndexError):
        corpus.line(row)


@pytest.mark.parametrize(
    ("third", "says"),
    [
        ("{broken", "JSON is malformed"),
        ('{"id": "1"}', "contents"),
        ('{"contents": "x"}', "id"),
        ('{"id": "1", "contents": 5}', "contents"),
        ('["1", "x"]', "object"),
        ("", "empty line"),
        ("   ", "each line must be one JSON object"),
    ],
)
def test_broken_line_is_named_with_file_and_line(tmp_path: Path, third: str, says: str) -> None:
    path = corpus_of(tmp_path, f"{GOOD}\n{GOOD}\n{third}\n{GOOD}\n")
    with pytest.raises(CorpusError, match="corpus.jsonl:3: ") as raised:
        Corpus.open(path)
    assert says in str(raised.value)


def test_invalid_utf8_is_named_with_its_line(tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match="corpus.jsonl:2: "):
        Corpus.open(corpus_of(tmp_path, GOOD.encode() + b'\n{"id": "1", "contents": "\xff"}\n'))


def test_missing_and_empty_corpus_say_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match="set data.corpus"):
        Corpus.open(tmp_path / "none.jsonl")
    with pytest.raises(CorpusError, match="empty"):
        Corpus.open(corpus_of(tmp_path, ""))


def test_check_rows_reads_beyond_the_first_rows(tmp_path: Path) -> None:
    corpus = Corpus.open(corpus_of(tmp_path, f"{GOOD}\n" * 200 + "{broken\n"))
    with pytest.raises(CorpusError, match="corpus.jsonl:201: "):
        corpus.check_rows()
