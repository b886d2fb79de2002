"""A FAISS index by inner product. Imports faiss: loaded only by what builds or searches.

FAISS writes -1 where it found too few passages; such places are dropped here and nowhere reach a corpus row.

| `index_mmap` | what is read                                                                                          |
|--------------|-------------------------------------------------------------------------------------------------------|
| false        | the whole file, into memory                                                                           |
| true         | Flat, HNSW, IVF, SQ, PQ, RaBitQ, with or without refinement: vectors, codes, links and lists stay in  |
|              | the file, their pages come as they are searched; only centroids, codebooks and the like are read      |
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Literal, NamedTuple

import faiss
import numpy as np

from services.contract.telemetry import Progress
from services.retriever.errors import IndexMismatch, RetrieverError
from services.retriever.flat_file import chunks
from services.retriever.shards import load_on_gpus

TRAIN_ROWS = 200_000
INNER = ("base_index", "index", "quantizer", "storage")
"""Where FAISS's composed kinds keep what they are made of."""


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
    def load(
        cls, path: Path, threads: int = 1, search: str = "", mmap: bool = False, device: Literal["cpu", "cuda"] = "cpu"
    ) -> FaissIndex:
        """`search` are FAISS's search parameters, such as `nprobe=32`. Raises IndexMismatch when the file is no whole index by
        inner product, RetrieverError when parameters or device do not fit."""
        index = load_on_gpus(path) if device == "cuda" else _read(path, mmap)
        if index.metric_type != faiss.METRIC_INNER_PRODUCT:
            raise IndexMismatch(f"{path}: metric is not inner product")
        set_search(index, search)
        return cls(index, threads)

    @property
    def rows(self) -> int:
        return self._index.ntotal

    @property
    def dimension(self) -> int:
        return self._index.d

    @property
    def kind(self) -> str:
        """FAISS's classes, outermost first."""
        return kind(self._index)

    def search(self, vectors: np.ndarray, topk: int) -> list[list[Hit]]:
        """float32 [queries, dimension] to at most `topk` hits each, best first."""
        scores, rows = self._index.search(vectors, topk)
        return [
            [Hit(row, score) for row, score in zip(r, s, strict=True) if row >= 0]
            for r, s in zip(rows.tolist(), scores.tolist(), strict=True)
        ]

    def stored(self, row: int) -> np.ndarray | None:
        """float32 [dimension] as kept for this row; None unless the kind keeps vectors whole."""
        return np.asarray(self._index.reconstruct(row)) if isinstance(self._index, faiss.IndexFlat) else None

    def save(self, path: Path) -> None:
        faiss.write_index(self._index, str(path))


def _read(path: Path, mmap: bool) -> faiss.Index:
    try:
        return faiss.read_index(str(path), faiss.IO_FLAG_MMAP_IFC if mmap else 0)
    except (RuntimeError, MemoryError) as error:
        raise IndexMismatch(
            f"{path}: FAISS cannot read this index ({_reason(error)}): truncated, or not FAISS's; get it again"
        ) from error


def _reason(error: BaseException) -> str:
    """What FAISS says, without the C++ signature that it says it in."""
    return str(error).splitlines()[0].rpartition(": ")[2] if str(error) else type(error).__name__


def kind(index: faiss.Index) -> str:
    """Such as `IndexRefineFlat(IndexIVFPQ(IndexFlat))`: what tells one kind of index from another."""
    cast = faiss.downcast_index(index)  # borrows from `index`, which must therefore keep its name here
    name = type(cast).__name__.removesuffix("IP").removesuffix("L2")
    inner = next((part for attribute in INNER if (part := getattr(cast, attribute, None)) is not None), None)
    return f"{name}({kind(inner)})" if isinstance(inner, faiss.Index) else name


def set_search(index: faiss.Index, text: str) -> None:
    """FAISS's own names: nprobe, efSearch, k_factor_rf, quantizer_efSearch, … Raises RetrieverError naming the one that is wrong.

    FAISS itself takes `nprobe=3x` for 3 and `nprobe=0` for a search that finds nothing.
    """
    for part in filter(None, re.split(r"\s*,\s*", text.strip())):
        name, _, value = (piece.strip() for piece in part.partition("="))
        if not re.fullmatch(r"[1-9]\d{0,8}", value):
            raise RetrieverError(f"retriever.index_search {text!r}: {part!r} is not a name and a whole number, such as nprobe=32")
        try:
            faiss.ParameterSpace().set_index_parameters(index, f"{name}={value}")
        except RuntimeError:
            raise RetrieverError(
                f"retriever.index_search {text!r}: an index of kind {kind(index)} has no {name!r}; "
                "HNSW has efSearch, IVF has nprobe, refinement has k_factor_rf"
            ) from None


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
        for chunk in chunks(embeddings):
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
