"""BM25: a Lucene index and the corpus as one resource, loaded only if they belong together.

`load_bm25` is the only way in. Two kinds of index are served:

| index                            | docids are                       | what is checked before it is served                    |
|----------------------------------|----------------------------------|--------------------------------------------------------|
| built by `index build`           | rows of the corpus               | manifest: corpus, analyzer, versions; then as below    |
| adopted (`retriever.bm25.index`) | rows, or the `id`s of the corpus | Lucene's checksums; as many documents as passages; a   |
|                                  |                                  | sample of the documents has the text of its passage    |

Lucene answers with docids only. What is served is the corpus's own line, the same bytes that dense retrieval serves.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import msgspec
import numpy as np

from services.contract.config import Config
from services.retriever.bm25_build import (
    Bm25Manifest,
    bm25_differences,
    bm25_folder,
    identify_bm25,
    lucene_folder,
)
from services.retriever.corpus import CANARY_CHARS, Corpus
from services.retriever.errors import IndexMismatch, RetrieverError
from services.retriever.lucene import LuceneHit, LuceneIndex, Stored, start_jvm, versions
from services.retriever.manifest import corpus_digest, read_manifest
from services.retriever.passages import Passage
from services.retriever.saying import Say, said_progress
from services.retriever.sources import Lookup

SAMPLE = 32
"""Documents compared with their passages when an index is loaded."""
ROWS_BETWEEN_NEWS = 10_000


class Docids(Protocol):
    """Which passage a docid stands for."""

    kind: str

    def row(self, docid: str) -> int:
        """Raises LookupError or ValueError when it stands for none."""
        ...


class RowNumbers:
    """A docid is the row, counted from 0: in indexes of ours, and in Search-R1's of wiki-18."""

    kind = "rows of the corpus"

    def __init__(self, rows: int) -> None:
        self._rows = rows

    def row(self, docid: str) -> int:
        row = int(docid)
        if not 0 <= row < self._rows:
            raise LookupError(f"docid {docid} is no row of a corpus of {self._rows} passages")
        return row


class CorpusIds:
    """A docid is the passage's `id`. In memory are 16 bytes a passage: the hashes, sorted, and their rows."""

    kind = "ids of the corpus"

    def __init__(self, corpus: Corpus, on_rows: Callable[[int], None]) -> None:
        """Raises IndexMismatch when two passages have the same id."""
        self._corpus = corpus
        hashes = np.empty(len(corpus), np.int64)
        for row in range(len(corpus)):
            hashes[row] = hash(self._id(row))
            if (row + 1) % ROWS_BETWEEN_NEWS == 0:
                on_rows(ROWS_BETWEEN_NEWS)
        self._rows = np.argsort(hashes, kind="stable")
        self._hashes = hashes[self._rows]
        self._refuse_twins()

    def row(self, docid: str) -> int:
        wanted = hash(docid)
        place = int(np.searchsorted(self._hashes, wanted))
        while place < len(self._hashes) and self._hashes[place] == wanted:
            row = int(self._rows[place])
            if self._id(row) == docid:
                return row
            place += 1
        raise LookupError(f"docid {docid!r} is no id of the corpus")

    def _id(self, row: int) -> str:
        return str(self._corpus[row]["id"])

    def _refuse_twins(self) -> None:
        for place in np.flatnonzero(self._hashes[1:] == self._hashes[:-1]):
            first, second = int(self._rows[place]), int(self._rows[place + 1])
            if self._id(first) == self._id(second):
                raise IndexMismatch(
                    f"{self._corpus.path}: rows {first} and {second} have the same id {self._id(first)!r}, so the docids of the "
                    "index do not say which passage was found; give every passage an id of its own and index it again"
                )


class Bm25Index:
    """A `Resource` of lookups: (query, topk) to at most topk passages, best first, by BM25."""

    def __init__(self, index: LuceneIndex, docids: Docids, corpus: Corpus, threads: int, info: dict[str, Any]) -> None:
        self.corpus, self.info = corpus, info
        self.seconds: dict[str, float] = {}
        self._index, self._docids, self._threads = index, docids, threads

    def canary(self) -> Lookup:
        return self.corpus.canary(), 1

    def answer(self, keys: Sequence[Lookup]) -> list[list[Passage]]:
        started = time.perf_counter()
        found: dict[Lookup, list[Passage]] = {}
        for topk in {topk for _, topk in keys}:
            mine = [key for key in keys if key[1] == topk]
            hits = self._index.search([query for query, _ in mine], topk, self._threads)
            found.update(zip(mine, (self._passages(of_one) for of_one in hits), strict=True))
        self.seconds = {"search": time.perf_counter() - started}
        return [found[key] for key in keys]

    def _passages(self, hits: Sequence[LuceneHit]) -> list[Passage]:
        return [Passage(self.corpus.line(self._docids.row(hit.docid)), hit.score) for hit in hits]


def load_bm25(config: Config, rebuild: str, say: Say) -> Bm25Index:
    """Raises RetrieverError, saying what does not fit and ending in the mend, unless index and corpus belong together."""
    settings = config.retriever.bm25
    say("opening the corpus")
    corpus = Corpus.open(config.data.corpus_path)
    say("starting Java")
    start_jvm(settings.heap)
    adopted = config.data.local(settings.index)
    folder, facts = (adopted, {}) if adopted else _built_index(config, corpus, rebuild, say)
    mend = mend_of(config, rebuild)
    say("opening the BM25 index")
    index = LuceneIndex(folder, settings.k1, settings.b, mend)
    say("checking the BM25 index")
    index.check_integrity(mend)
    docids = match_docids(index, corpus, mend, say)
    info = {
        "index": "adopted" if adopted else "built",
        "k1": settings.k1,
        "b": settings.b,
        "analyzer": index.analyzer,
        "docids": docids.kind,
        "passages": len(index),
        **versions(),
        **facts,
    }
    bm25 = Bm25Index(index, docids, corpus, config.retriever.threads, info)
    say("asking the canary query")
    ask_bm25_canary(bm25, index, mend)
    return bm25


def mend_of(config: Config, rebuild: str) -> str:
    if config.retriever.bm25.index is None:
        return f"Rebuild it: {rebuild}"
    return (
        f"Set data.corpus to the corpus that the index was made from (now {config.data.corpus_path}), "
        f"or leave retriever.bm25.index out and build one: {rebuild}"
    )


def _built_index(config: Config, corpus: Corpus, rebuild: str, say: Say) -> tuple[Path, dict[str, Any]]:
    """Its folder and what /info says of it. Raises IndexMismatch unless its manifest fits."""
    folder = bm25_folder(config)
    manifest = read_manifest(folder, Bm25Manifest, f"Rebuild it: {rebuild}")
    if manifest is None:
        raise IndexMismatch(f"{folder}: no whole BM25 index here (manifest.json is missing). Build it: {rebuild}")
    say("comparing the corpus with the BM25 index")
    on_bytes = said_progress("reading the corpus", corpus.path.stat().st_size, "bytes", say)
    problems = bm25_differences(manifest, identify_bm25(corpus, corpus_digest(corpus.path, manifest, on_bytes)))
    if problems:
        raise IndexMismatch(f"{folder}: the BM25 index does not belong to this run: {'; '.join(problems)}. Rebuild it: {rebuild}")
    return lucene_folder(folder), {"corpus_digest": manifest.corpus_sha256}


def ask_bm25_canary(bm25: Bm25Index, index: LuceneIndex, mend: str) -> None:
    """The start of the first passage must find something, if there is a word in it to find it by."""
    key = bm25.canary()
    if index.terms(bm25.corpus.contents(0)[:CANARY_CHARS]) and not bm25.answer([key])[0]:
        raise RetrieverError(f"{index.folder}: the canary query {key[0]!r} found nothing: the index is not usable. {mend}")


# -- does the index belong to the corpus? ------------------------------------------------------------------------------


def match_docids(index: LuceneIndex, corpus: Corpus, mend: str, say: Say) -> Docids:
    """How docids become rows. Raises IndexMismatch, naming the assumption that failed."""
    if len(index) != len(corpus):
        counts = f"{len(index):,} documents in the index, {len(corpus):,} passages in the corpus"
        raise IndexMismatch(f"{index.folder}: {counts}; they must be as many. {mend}")
    sample = [index.stored(int(place)) for place in np.unique(np.linspace(0, len(index) - 1, SAMPLE, dtype=np.int64))]
    rows = RowNumbers(len(corpus))
    as_rows = first_misfit(index, corpus, rows, sample)
    if as_rows is None:
        return rows
    ids = CorpusIds(corpus, said_progress("reading the ids of the corpus", len(corpus), "passages", say))
    as_ids = first_misfit(index, corpus, ids, sample)
    if as_ids is None:
        return ids
    raise IndexMismatch(
        f"{index.folder}: the documents are not the passages of {corpus.path}. Docids taken as {rows.kind}: {as_rows}. "
        f"Docids taken as {ids.kind}: {as_ids}. {mend}"
    )


def first_misfit(index: LuceneIndex, corpus: Corpus, docids: Docids, sample: Sequence[Stored]) -> str | None:
    """Why a document of the sample is not the passage that its docid stands for; None when all of them are."""
    for stored in sample:
        if stored.docid is None:
            return "a document has no field `id`: this is not an index of pyserini's or Anserini's"
        try:
            row = docids.row(stored.docid)
        except (LookupError, ValueError):
            return f"docid {stored.docid!r} stands for no passage"
        if problem := _misfit(index, stored, corpus.contents(row)):
            return f"docid {stored.docid!r} stands for row {row}, {problem}"
    return None


def _misfit(index: LuceneIndex, stored: Stored, text: str) -> str | None:
    """By the raw document where the index keeps it and it has `contents`, else by the terms."""
    assert stored.docid is not None
    kept = _contents_of(stored.raw)
    if kept is not None:
        return None if kept.split() == text.split() else "whose text is not the one stored in the index"
    return (
        None
        if index.has_terms(stored.docid, text)
        else "whose words are not all in that document (other text, or indexed with another analyzer)"
    )


def _contents_of(raw: str | None) -> str | None:
    try:
        decoded = msgspec.json.decode(raw) if raw else None
    except msgspec.DecodeError:
        return None
    contents = decoded.get("contents") if isinstance(decoded, dict) else None
    return contents if isinstance(contents, str) else None
