"""FAISS's file of a flat index: a header and the vectors one after another, read and written without holding them.

| bytes   | type    | is                                            |
|---------|---------|-----------------------------------------------|
| 0       | 4 chars | `IxFI`: flat, inner product (`IxF2`: L2)      |
| 4       | int32   | dimension                                     |
| 8       | int64   | rows                                          |
| 16, 24  | int64   | unused                                        |
| 32      | uint8   | trained                                       |
| 33      | int32   | metric; 0 is inner product                    |
| 37      | uint64  | float32 numbers that follow                   |
| 45      | float32 | rows × dimension                              |

So an index of 64 GB is written from embeddings, and read onto GPUs, in a few megabytes.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from services.contract.telemetry import Progress
from services.retriever.errors import IndexMismatch

HEADER = struct.Struct("<4siqqqBiQ")
FLAT_IP = b"IxFI"
UNUSED = 1 << 20
INNER_PRODUCT = 0
CHUNK_ROWS = 65_536


class FlatHeader(NamedTuple):
    dimension: int
    rows: int

    @property
    def file_bytes(self) -> int:
        return HEADER.size + 4 * self.rows * self.dimension


def flat_header(start: bytes, name: object) -> FlatHeader | None:
    """Of a file that begins with `start`; None when it is no flat inner-product index. Raises IndexMismatch when it contradicts
    itself."""
    if len(start) < HEADER.size or not start.startswith(FLAT_IP):
        return None
    _, dimension, rows, _, _, _, metric, numbers = HEADER.unpack_from(start)
    if metric != INNER_PRODUCT or dimension < 1 or rows * dimension != numbers:
        raise IndexMismatch(f"{name}: broken header ({rows} rows of {dimension}, {numbers} numbers, metric {metric}); get it again")
    return FlatHeader(dimension, rows)


def map_flat(path: Path) -> np.ndarray:
    """float32 [rows, dimension], memory-mapped. Raises IndexMismatch when this is no whole flat inner-product index."""
    with path.open("rb") as file:
        header = flat_header(file.read(HEADER.size), path)
    if header is None:
        raise IndexMismatch(f'{path}: not a flat inner-product index, which retriever.index_factory "Flat" makes')
    if (size := path.stat().st_size) != header.file_bytes:
        raise IndexMismatch(f"{path}: {size:,} bytes, {header.file_bytes:,} expected (truncated?)")
    return np.memmap(path, np.float32, "r", HEADER.size, (header.rows, header.dimension))


def chunks(vectors: np.ndarray, start: int = 0, stop: int | None = None) -> Iterator[np.ndarray]:
    """Rows [start, stop) as float32 [at most 65,536, dimension] in memory, one after another."""
    end = len(vectors) if stop is None else stop
    for begin in range(start, end, CHUNK_ROWS):
        yield np.ascontiguousarray(vectors[begin : min(begin + CHUNK_ROWS, end)], np.float32)


def write_flat(path: Path, embeddings: np.ndarray) -> None:
    """float32 [rows, dimension] as FAISS's file of a flat inner-product index."""
    rows, dimension = embeddings.shape
    with path.open("wb") as file, Progress("writing the Flat index", rows, "passages") as bar:
        file.write(HEADER.pack(FLAT_IP, dimension, rows, UNUSED, UNUSED, 1, INNER_PRODUCT, rows * dimension))
        for chunk in chunks(embeddings):
            file.write(chunk.tobytes())
            bar.advance(len(chunk))
