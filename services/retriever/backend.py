"""Encoder, index and corpus as one thing that answers queries, loaded only if they belong together.

`load_dense` is the only way in: every check that keeps a wrong passage from being served happens there.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np

from services.contract.config import Config
from services.contract.telemetry import Progress
from services.retriever.corpus import Corpus
from services.retriever.encoder import Encoder, describe_encoder, load_encoder
from services.retriever.errors import IndexMismatch, RetrieverError
from services.retriever.index import FaissIndex, Hit
from services.retriever.manifest import check_index_file, corpus_digest, identify, index_path, index_problems, read_manifest

log = logging.getLogger("retriever")

Say = Callable[[str], None]
"""Hears what is being done, for people who wait on /ready."""


class Backend(Protocol):
    """What the owner thread drives. One thread at a time calls it."""

    @property
    def corpus(self) -> Corpus: ...

    @property
    def info(self) -> dict[str, Any]:
        """What /info answers about it."""
        ...

    @property
    def seconds(self) -> dict[str, float]:
        """How long each stage of the last search took."""
        ...

    def search(self, queries: Sequence[str], topks: Sequence[int]) -> list[list[Hit]]:
        """At most `topks[i]` hits for `queries[i]`, best first."""
        ...


class DenseBackend:
    def __init__(self, encoder: Encoder, index: FaissIndex, corpus: Corpus, info: dict[str, Any]) -> None:
        self.corpus, self.info = corpus, info
        self.seconds: dict[str, float] = {}
        self._encoder, self._index = encoder, index

    def search(self, queries: Sequence[str], topks: Sequence[int]) -> list[list[Hit]]:
        started = time.perf_counter()
        vectors = self._encoder.encode(queries, "query")
        if not np.isfinite(vectors).all():
            raise RuntimeError("the encoder gave a number that is not finite")
        encoded = time.perf_counter()
        hits = self._search(vectors, topks)
        self.seconds = {"encode": encoded - started, "search": time.perf_counter() - encoded}
        return hits

    def _search(self, vectors: np.ndarray, topks: Sequence[int]) -> list[list[Hit]]:
        """One search per distinct topk: an approximate index answers differently to a larger one, and no request may
        change another's answer."""
        hits: list[list[Hit]] = [[] for _ in topks]
        for topk in set(topks):
            places = [place for place, wanted in enumerate(topks) if wanted == topk]
            for place, found in zip(places, self._index.search(vectors[places], topk), strict=True):
                hits[place] = found
        return hits


def load_dense(config: Config, rebuild: str, say: Say) -> DenseBackend:
    """Raises IndexMismatch, naming the fields and ending in the `rebuild` command, unless index, corpus and encoder agree."""
    folder, threads = config.data.index_folder, config.retriever.threads
    say("opening the corpus")
    corpus = Corpus.open(config.data.corpus_path)
    description = describe_encoder(config)
    manifest = read_manifest(folder)
    if manifest is None:
        raise IndexMismatch(f"{folder}: no whole index here (manifest.json is missing). Build it: {rebuild}")
    digest = corpus_digest(corpus.path, manifest, _progress("reading the corpus", corpus.path.stat().st_size, say))
    problems = index_problems(folder, manifest, identify(description, corpus, digest), config.retriever.index_factory)
    problems = problems or check_index_file(folder, manifest, _progress("checking the index", manifest.index_bytes, say))
    if problems:
        raise IndexMismatch(f"{folder}: the index does not belong to this run: {'; '.join(problems)}. Rebuild it: {rebuild}")
    say(f"loading the encoder {description.name}")
    encoder = load_encoder(description, threads)
    say(f"loading the index ({manifest.index_bytes:,} bytes)")
    index = FaissIndex.load(index_path(folder), threads)
    _agree(index, encoder, corpus, rebuild)
    info = {
        "backend": "dense",
        "encoder": description.name,
        "encoder_digest": description.digest,
        "family": description.family.name,
        "pooling": description.family.pooling,
        "normalized": description.family.normalized,
        "index": manifest.factory,
        "index_digest": manifest.index_sha256,
        "metric": manifest.metric,
        "dimension": index.dimension,
        "passages": index.rows,
        "corpus_digest": manifest.corpus_sha256,
    }
    backend = DenseBackend(encoder, index, corpus, info)
    say("asking the canary query")
    ask_canary(backend)
    return backend


def _progress(label: str, total: int, say: Say) -> Callable[[int], None]:
    bar = Progress(label, total, "bytes")

    def on_bytes(count: int) -> None:
        bar.advance(count)
        say(bar.line())

    return on_bytes


def _agree(index: FaissIndex, encoder: Encoder, corpus: Corpus, rebuild: str) -> None:
    if index.rows != len(corpus):
        raise IndexMismatch(f"rows: {index.rows} in the index, {len(corpus)} in the corpus. Rebuild it: {rebuild}")
    if index.dimension != encoder.dimension:
        raise IndexMismatch(
            f"dimension: {index.dimension} in the index, {encoder.dimension} from the encoder. Rebuild it: {rebuild}"
        )


def ask_canary(backend: Backend) -> None:
    """The start of the first passage must find something in the corpus."""
    hits = backend.search([backend.corpus.canary()], [1])[0]
    if not hits or not 0 <= hits[0].row < len(backend.corpus) or not math.isfinite(hits[0].score):
        raise RetrieverError(f"the canary query was answered with {hits}: the index is not usable")
