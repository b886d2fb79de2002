"""A FAISS index by inner product. Imports faiss: loaded only by what builds or searches.

FAISS writes -1 where it found too few passages; such places are dropped here and nowhere reach a corpus row.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import faiss
import numpy as np

from services.contract.telemetry import Progress
from services.retriever.errors import IndexMismatch, RetrieverError

ADD_ROWS = 65_536
TRAIN_ROWS = 200_000


class Hit(NamedTuple):
    row: int
    """The passage's row in the corpus."""
    score: float
    """Inner product; the cosine where the family normalises."""


class FaissIndex:
    def __init__(self, index: faiss.Index, threads: int = 1) -> None:
        self._index = index
        # OpenMP keeps this number per thread: the thread that builds or searches must be the one that sets it.
        faiss.omp_set_num_threads(threads)

    @classmethod
    def load(cls, path: Path, threads: int = 1) -> FaissIndex:
        try:
            index = faiss.read_index(str(path))
        except RuntimeError as error:
            raise IndexMismatch(f"{path}: FAISS cannot read this index ({error})") from error
        if index.metric_type != faiss.METRIC_INNER_PRODUCT:
            raise IndexMismatch(f"{path}: metric is not inner product")
        return cls(index, threads)

    @property
    def rows(self) -> int:
        return self._index.ntotal

    @property
    def dimension(self) -> int:
        return self._index.d

    def search(self, vectors: np.ndarray, topk: int) -> list[list[Hit]]:
        """float32 [queries, dimension] to at most `topk` hits each, best first."""
        scores, rows = self._index.search(vectors, topk)
        return [
            [Hit(row, score) for row, score in zip(r, s, strict=True) if row >= 0]
            for r, s in zip(rows.tolist(), scores.tolist(), strict=True)
        ]

    def save(self, path: Path) -> None:
        faiss.write_index(self._index, str(path))


def new_index(factory: str, dimension: int) -> faiss.Index:
    try:
        return faiss.index_factory(dimension, factory, faiss.METRIC_INNER_PRODUCT)
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise RetrieverError(
            f"retriever.index_factory {factory!r}: FAISS does not know it for dimension {dimension} ({reason})"
        ) from None


def fill_index(factory: str, embeddings: np.ndarray, threads: int = 1) -> FaissIndex:
    """Train on a sample if the kind needs it, then add float32 [rows, dimension] in chunks."""
    index = new_index(factory, embeddings.shape[1])
    wrapped = FaissIndex(index, threads)
    if not index.is_trained:
        _train(index, factory, embeddings)
    with Progress(f"adding to the {factory} index", len(embeddings), "passages") as bar:
        for start in range(0, len(embeddings), ADD_ROWS):
            chunk = np.ascontiguousarray(embeddings[start : start + ADD_ROWS])
            index.add(chunk)
            bar.advance(len(chunk))
    return wrapped


def _train(index: faiss.Index, factory: str, embeddings: np.ndarray) -> None:
    rows = np.random.default_rng(0).permutation(len(embeddings))[:TRAIN_ROWS]
    try:
        index.train(np.ascontiguousarray(embeddings[np.sort(rows)]))
    except RuntimeError as error:
        raise RetrieverError(
            f"retriever.index_factory {factory!r} cannot be trained on {len(rows)} passages ({error}); use 'Flat' or fewer clusters"
        ) from error
