"""Encoder, FAISS index and corpus as one resource, loaded only if they belong together.

`load_dense` is the only way in: every check that keeps a wrong passage from being served happens there.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from services.contract.config import Config
from services.retriever.corpus import Corpus
from services.retriever.encoder import Encoder, describe_encoders, load_encoder
from services.retriever.errors import IndexMismatch, RetrieverError
from services.retriever.index import FaissIndex
from services.retriever.manifest import (
    Manifest,
    check_index_file,
    corpus_digest,
    identify,
    index_path,
    index_problems,
    looks_untouched,
    read_manifest,
)
from services.retriever.passages import Passage
from services.retriever.saying import Say, said_progress
from services.retriever.sources import Lookup


class DenseIndex:
    """A `Resource` of lookups: (query, topk) to at most topk passages, best first, by inner product."""

    def __init__(self, encoder: Encoder, index: FaissIndex, corpus: Corpus, info: dict[str, Any]) -> None:
        self.corpus, self.info = corpus, info
        self.seconds: dict[str, float] = {}
        self._encoder, self._index = encoder, index

    def canary(self) -> Lookup:
        return self.corpus.canary(), 1

    def answer(self, keys: Sequence[Lookup]) -> list[list[Passage]]:
        started = time.perf_counter()
        queries = list(dict.fromkeys(query for query, _ in keys))
        vectors = self._encoder.encode(queries, "query")
        if not np.isfinite(vectors).all():
            raise RuntimeError("the encoder gave a number that is not finite")
        encoded = time.perf_counter()
        found = self._search(keys, {query: place for place, query in enumerate(queries)}, vectors)
        self.seconds = {"encode": encoded - started, "search": time.perf_counter() - encoded}
        return [found[key] for key in keys]

    def _search(self, keys: Sequence[Lookup], place: dict[str, int], vectors: np.ndarray) -> dict[Lookup, list[Passage]]:
        """One search per distinct topk: an approximate index answers differently to a larger one, and no request may
        change another's answer."""
        found: dict[Lookup, list[Passage]] = {}
        for topk in {topk for _, topk in keys}:
            mine = [key for key in keys if key[1] == topk]
            hits = self._index.search(vectors[[place[query] for query, _ in mine]], topk)
            found.update(zip(mine, ([Passage(self.corpus.line(h.row), h.score) for h in one] for one in hits), strict=True))
        return found


def load_dense(config: Config, rebuild: str, say: Say) -> DenseIndex:
    """Raises IndexMismatch, naming the fields and ending in the `rebuild` command, unless index, corpus and encoder agree."""
    folder, threads = config.data.index_folder, config.retriever.threads
    say("opening the corpus")
    corpus = Corpus.open(config.data.corpus_path)
    queries, passages = describe_encoders(config)
    manifest = read_manifest(folder, Manifest, f"Rebuild it: {rebuild}")
    if manifest is None:
        raise IndexMismatch(f"{folder}: no whole index here (manifest.json is missing). Build it: {rebuild}")
    digest = corpus_digest(corpus.path, manifest, said_progress("reading the corpus", corpus.path.stat().st_size, "bytes", say))
    problems = index_problems(folder, manifest, identify(passages, corpus, digest), config.retriever.index_factory)
    if not problems and not (config.retriever.index_mmap and looks_untouched(folder, manifest)):
        problems = check_index_file(folder, manifest, said_progress("checking the index", manifest.index_bytes, "bytes", say))
    if problems:
        raise IndexMismatch(f"{folder}: the index does not belong to this run: {'; '.join(problems)}. Rebuild it: {rebuild}")
    say(f"loading the encoder {queries.name}")
    encoder = load_encoder(queries, threads)
    say(f"loading the index ({manifest.index_bytes:,} bytes)")
    settings = config.retriever
    index = FaissIndex.load(index_path(folder), threads, settings.index_search, settings.index_mmap, settings.index_device)
    _agree(index, encoder, corpus, rebuild)
    info = {
        "encoder": queries.name,
        "encoder_digest": queries.digest,
        "encoder_runtime": encoder.runtime,
        "family": queries.family.name,
        "pooling": queries.family.pooling,
        "normalized": queries.family.normalized,
        "index": manifest.factory,
        "index_digest": manifest.index_sha256,
        "metric": manifest.metric,
        "dimension": index.dimension,
        "passages": index.rows,
        "corpus_digest": manifest.corpus_sha256,
    }
    dense = DenseIndex(encoder, index, corpus, info)
    say("asking the canary query")
    ask_canary(dense)
    return dense


def _agree(index: FaissIndex, encoder: Encoder, corpus: Corpus, rebuild: str) -> None:
    if index.rows != len(corpus):
        raise IndexMismatch(f"rows: {index.rows} in the index, {len(corpus)} in the corpus. Rebuild it: {rebuild}")
    if index.dimension != encoder.dimension:
        raise IndexMismatch(
            f"dimension: {index.dimension} in the index, {encoder.dimension} from the encoder. Rebuild it: {rebuild}"
        )


def ask_canary(dense: DenseIndex) -> None:
    """The start of the first passage must find something in the corpus."""
    (found,) = dense.answer([dense.canary()])
    if not found or not math.isfinite(found[0].score):
        raise RetrieverError(f"the canary query was answered with {found}: the index is not usable")
