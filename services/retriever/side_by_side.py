"""Rows computed in parts, each part by a thread of its own."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import numpy as np

T = TypeVar("T")
PART_ROWS = 8
"""Rows computed together. More are hardly faster on a CPU; fewer, of like length, leave little padding and no thread idle."""


class SideBySide:
    """Each of `threads` threads computes a part of the rows by itself, rather than all of them one matrix product.

    OpenMP threads meet at a barrier many times a layer: when another process has one of the cores, all of them spin
    there. Seen with a busy neighbour on two cores: 11 queries/s with OpenMP's two threads, 158 with one.
    """

    def __init__(self, name: str, threads: int, part_rows: int = PART_ROWS) -> None:
        self._part_rows = part_rows
        self._pool = ThreadPoolExecutor(threads, name) if threads > 1 else None
        self.tokenizing = threading.Lock()
        """A tokenizer refuses to be used from two threads at once."""

    def run(self, rows: Sequence[T], lengths: Sequence[int], work: Callable[[list[T]], np.ndarray]) -> np.ndarray:
        """`work` on all rows, float32 in their order; like lengths come together."""
        parts = -(-len(rows) // self._part_rows)
        if parts < 2:
            return np.ascontiguousarray(work(list(rows)), np.float32)
        places = np.array_split(np.argsort(lengths, kind="stable")[::-1], parts)  # the longest first: no thread ends late
        each = self._pool.map if self._pool else map
        done = list(each(lambda part: work([rows[place] for place in part]), places))
        results = np.empty((len(rows), *done[0].shape[1:]), np.float32)
        for part, result in zip(places, done, strict=True):
            results[part] = result
        return results
