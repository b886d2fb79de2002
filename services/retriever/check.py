"""`index check`: is the index whole, of this corpus and this encoder, and does it find what was put in?

A sample of passages is encoded anew and looked up. What must hold depends on the kind:

| kind                            | of the sample                                                                        |
|---------------------------------|--------------------------------------------------------------------------------------|
| Flat, family that normalises    | every passage is first for itself, and its stored vector points where the new does  |
| Flat, family that does not      | every stored vector points there; half are first (a longer vector may outscore them)|
| any other: approximate          | half are first for themselves; a wrong encoder, corpus or row order finds almost none |

A passage with the same text, or the same score up to rounding, counts as itself: corpora hold duplicates.
"""

from __future__ import annotations

import numpy as np

from services.contract.config import Config
from services.retriever.corpus import Corpus
from services.retriever.encoder import Encoder, describe_encoder, load_encoder
from services.retriever.index import FaissIndex, Hit
from services.retriever.manifest import (
    Manifest,
    check_index_file,
    corpus_digest,
    identify,
    index_path,
    index_problems,
    read_manifest,
)

SAMPLE_ROWS = 32
LEAST_COSINE = 0.99
"""Half-precision encoding keeps 0.9999; a missing prefix or another pooling costs more than this."""
SCORE_ROUNDING = 1e-3
"""Of a score: two encodings of one text in different precisions differ by so much."""


def check_index(config: Config) -> list[str]:
    """What is wrong, a phrase for each field; empty when the index may be served. Raises IndexMismatch, RetrieverError when
    there is nothing to compare."""
    folder, threads = config.data.index_folder, config.retriever.threads
    manifest = read_manifest(folder, Manifest, "Rebuild it")
    if manifest is None:
        return ["manifest.json is missing: no whole index is here"]
    corpus, description = Corpus.open(config.data.corpus_path), describe_encoder(config, "passage")
    identity = identify(description, corpus, corpus_digest(corpus.path, None))
    problems = index_problems(folder, manifest, identity, config.retriever.index_factory)
    if problems := problems or check_index_file(folder, manifest):
        return problems
    index = FaissIndex.load(index_path(folder), threads, config.retriever.index_search, mmap=True)
    return content_problems(index, load_encoder(description, threads), corpus)


def content_problems(index: FaissIndex, encoder: Encoder, corpus: Corpus) -> list[str]:
    """Rows, dimension, then the sample: a phrase for the first that does not fit."""
    if index.rows != len(corpus):
        return [f"rows: {index.rows:,} in the index, {len(corpus):,} in the corpus; set data.corpus to the one it was built from"]
    if index.dimension != encoder.dimension:
        return [
            f"dimension: {index.dimension} in the index, {encoder.dimension} from the encoder; "
            "set retriever.encoder to the model it was built with"
        ]
    return sample_problems(index, encoder, corpus)


def sample_problems(index: FaissIndex, encoder: Encoder, corpus: Corpus, count: int = SAMPLE_ROWS) -> list[str]:
    """See the table above; the sample is the same every time."""
    rows = np.sort(np.random.default_rng(0).permutation(len(corpus))[:count]).tolist()
    vectors = encoder.encode([corpus.contents(row) for row in rows], "passage")
    stored = [index.stored(row) for row in rows]
    turned = [
        f"{row} (cosine {cosine:.3f})"
        for row, new, old in zip(rows, vectors, stored, strict=True)
        if old is not None and (cosine := _cosine(new, old)) < LEAST_COSINE
    ]
    if turned:
        return [
            f"vectors: {len(turned)} of {len(rows)} sampled rows are stored otherwise than the encoder gives them now, such as row "
            f"{turned[0]}; the corpus has other rows, or retriever.encoder, encoder_family or encoder_max_tokens differ"
        ]
    hits = [found[0] if found else None for found in index.search(vectors, 1)]
    strays = [
        row for row, hit, new, old in zip(rows, hits, vectors, stored, strict=True) if not _is_own(corpus, row, hit, new, old)
    ]
    exact = stored[0] is not None and np.allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-3)
    if len(strays) > (0 if exact else len(rows) // 2):
        return [
            f"rank: {len(strays)} of {len(rows)} sampled passages are not found first by their own text, such as row {strays[0]}; "
            "the corpus has other rows, or retriever.encoder or encoder_family differ"
            + ("" if exact else ", or retriever.index_search is too narrow")
        ]
    return []


def _cosine(one: np.ndarray, other: np.ndarray) -> float:
    lengths = float(np.linalg.norm(one) * np.linalg.norm(other))
    return float(one @ other) / lengths if lengths else float(np.array_equal(one, other))


def _is_own(corpus: Corpus, row: int, hit: Hit | None, new: np.ndarray, stored: np.ndarray | None) -> bool:
    if hit is None:
        return False
    if hit.row == row or corpus.contents(hit.row) == corpus.contents(row):
        return True
    return stored is not None and hit.score - float(new @ stored) <= SCORE_ROUNDING * abs(hit.score)
