"""The corpus in batches, and what encodes one.

Rows are taken a window of 65,536 at a time, sorted by length within it, and cut into batches of 64: little is padded, and
memory does not grow with the corpus. The same corpus always gives the same batches.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from services.retriever.corpus import Corpus
from services.retriever.encoder import Encoder
from services.retriever.errors import RetrieverError

BATCH_ROWS = 64
"""Passages encoded together on a CPU, and the grain of resuming: it must not change with threads, workers or device."""
WINDOW_ROWS = 1024 * BATCH_ROWS


class Plan:
    """Which rows make which batch."""

    def __init__(self, corpus: Corpus) -> None:
        self._corpus = corpus
        self._window, self._order = -1, np.empty(0, np.int64)

    @property
    def batches(self) -> int:
        return -(-len(self._corpus) // BATCH_ROWS)

    def rows(self, batch: int) -> np.ndarray:
        """int64 [at most 64]: rows of like length."""
        window, place = divmod(batch * BATCH_ROWS, WINDOW_ROWS)
        if window != self._window:
            start = window * WINDOW_ROWS
            lengths = self._corpus.lengths(start, min(start + WINDOW_ROWS, len(self._corpus)))
            self._window, self._order = window, np.argsort(lengths, kind="stable") + start
        return self._order[place : place + BATCH_ROWS]

    def tasks(self, done: np.ndarray, together: int) -> Iterator[list[int]]:
        """The batches that are not done, `together` neighbours at a time; shuffled in their window so that the ETA is honest."""
        shuffle = np.random.default_rng(0).permutation
        for window in range(0, self.batches, WINDOW_ROWS // BATCH_ROWS):
            left = np.flatnonzero(~done[window : window + WINDOW_ROWS // BATCH_ROWS]) + window
            starts = range(0, len(left), together)
            for place in shuffle(len(starts)):
                yield left[starts[place] : starts[place] + together].tolist()


class Encoding:
    """Encodes batches into the embeddings file; the one of a worker and the one of the building process are alike."""

    def __init__(self, corpus: Corpus, encoder: Encoder, vectors: np.ndarray, name: object) -> None:
        if encoder.dimension != vectors.shape[1]:
            raise RetrieverError(f"{name}: the model gives {encoder.dimension} numbers, its config.json says {vectors.shape[1]}")
        self._corpus, self._encoder, self._vectors, self._name = corpus, encoder, vectors, name
        self._plan = Plan(corpus)

    def run(self, task: Sequence[int]) -> None:
        rows = np.concatenate([self._plan.rows(batch) for batch in task])
        encoded = self._encoder.encode([self._corpus.contents(int(row)) for row in rows], "passage")
        if not np.isfinite(encoded).all():
            broken = rows[~np.isfinite(encoded).all(axis=1)]
            raise RetrieverError(
                f"{self._name}: the encoder gave a number that is not finite for rows {broken.tolist()}; "
                'if retriever.encoder_dtype is "float16", try "bfloat16" or "float32"'
            )
        self._vectors[rows] = encoded
