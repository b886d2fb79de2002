"""A Lucene index from elsewhere: served when its documents are the corpus's passages, else refused with the reason."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from services.retriever.bm25 import CorpusIds, RowNumbers
from services.retriever.corpus import Corpus
from services.retriever.errors import IndexMismatch
from services.retriever.lucene import LuceneWriter, java, start_jvm
from tests.retriever.bm25_support import HEAP, configure, load, rows_of, with_bm25
from tests.retriever.conftest import passage, query, write_corpus


def foreign_index(folder: Path, documents: list[tuple[str, str]]) -> Path:
    """As pyserini writes it, raw documents not stored."""
    start_jvm(HEAP)
    folder.mkdir()
    writer = LuceneWriter(folder, threads=1, buffer_mb=16)
    assert writer.add(documents) == len(documents)
    writer.close()
    return folder


def with_raw(folder: Path, contents: Callable[[int], str]) -> Path:
    """By pyserini's own JsonCollection, raw documents stored."""
    start_jvm(HEAP)
    words = ["-input", "", "-collection", "JsonCollection", "-index", str(folder), "-threads", "1", "-storeRaw"]
    indexer = java("io.anserini.index.SimpleIndexer")(words)
    indexer.addRawDocuments([json.dumps({"id": str(row), "title": "t", "contents": contents(row)}) for row in range(100)])
    indexer.close()
    return folder


def text_of(row: int) -> str:
    return passage(row)["contents"]


def test_adopted_index_whose_docids_are_rows(tmp_path: Path) -> None:
    config = configure(tmp_path)
    folder = foreign_index(tmp_path / "foreign", [(str(row), text_of(row)) for row in range(100)])
    index = load(with_bm25(config, index=folder))
    assert index.info["docids"] == "rows of the corpus"
    assert all(rows_of(index, query(row), 1) == [row] for row in range(100))


def test_adopted_index_whose_docids_are_ids_of_the_corpus(tmp_path: Path) -> None:
    config = configure(tmp_path)
    documents = [(passage(row)["id"], text_of(row)) for row in range(100)]
    index = load(with_bm25(config, index=foreign_index(tmp_path / "foreign", documents[::-1])))
    assert index.info["docids"] == "ids of the corpus"
    assert all(rows_of(index, query(row), 1) == [row] for row in range(100))


def test_adopted_index_with_raw_documents(tmp_path: Path) -> None:
    index = load(with_bm25(configure(tmp_path), index=with_raw(tmp_path / "foreign", text_of)))
    assert rows_of(index, query(42), 1) == [42]
    assert index.answer([(query(42), 1)])[0][0].document == json.dumps(passage(42)).encode()


def test_stored_raw_documents_are_compared_to_the_word_order(tmp_path: Path) -> None:
    """The same words in another order: only the raw text tells."""
    folder = with_raw(tmp_path / "foreign", lambda row: " ".join(reversed(text_of(row).split())))
    with pytest.raises(IndexMismatch, match="whose text is not the one stored"):
        load(with_bm25(configure(tmp_path), index=folder))


def shifted(row: int) -> tuple[str, str]:
    return str((row + 1) % 100), text_of(row)


def unknown_docid(row: int) -> tuple[str, str]:
    return f"doc{row}", text_of(row)


def from_one(row: int) -> tuple[str, str]:
    return str(row + 1), text_of(row)


@pytest.mark.parametrize(
    ("document", "reason"),
    [
        (shifted, "whose words are not all in that document"),
        (unknown_docid, "docid 'doc0' stands for no passage"),
        (from_one, "whose words are not all in that document"),
    ],
)
def test_adopted_index_of_other_rows_is_refused(tmp_path: Path, document: Callable[[int], tuple[str, str]], reason: str) -> None:
    folder = foreign_index(tmp_path / "foreign", [document(row) for row in range(100)])
    with pytest.raises(IndexMismatch, match=rf"{reason}.*Set data.corpus.*REBUILD"):
        load(with_bm25(configure(tmp_path), index=folder))


@pytest.mark.parametrize("rows", [99, 101])
def test_adopted_index_with_another_count_is_refused(tmp_path: Path, rows: int) -> None:
    folder = foreign_index(tmp_path / "foreign", [(str(row), text_of(row)) for row in range(rows)])
    with pytest.raises(IndexMismatch, match=rf"{rows} documents in the index, 100 passages in the corpus.*Set data.corpus"):
        load(with_bm25(configure(tmp_path), index=folder))


def test_adopted_folder_without_an_index_is_refused_and_not_made(tmp_path: Path) -> None:
    with pytest.raises(IndexMismatch, match="no Lucene index here"):
        load(with_bm25(configure(tmp_path), index=tmp_path / "missing"))
    assert not (tmp_path / "missing").exists()


def test_corpus_ids_find_their_rows_and_refuse_twins(tmp_path: Path) -> None:
    rows = [{"id": name, "contents": "text"} for name in ["b", 7, "a", "7x"]]
    ids = CorpusIds(Corpus.open(write_corpus(tmp_path / "corpus.jsonl", rows)), lambda count: None)
    assert [ids.row(name) for name in ("b", "7", "a", "7x")] == [0, 1, 2, 3]
    with pytest.raises(LookupError):
        ids.row("c")
    rows.append({"id": "7", "contents": "other text"})
    with pytest.raises(IndexMismatch, match="rows 1 and 4 have the same id '7'"):
        CorpusIds(Corpus.open(write_corpus(tmp_path / "corpus.jsonl", rows)), lambda count: None)


@pytest.mark.parametrize("docid", ["-1", "100", "x", ""])
def test_a_docid_that_is_no_row_is_an_error_and_never_another_row(docid: str) -> None:
    with pytest.raises((LookupError, ValueError)):
        RowNumbers(100).row(docid)
