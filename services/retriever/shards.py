"""A flat index over several devices as float16, filled from the mapped file chunk by chunk.

The float32 index is never whole in host or device memory: a device receives its rows in chunks and halves them. Appending
makes a device copy what it holds, so a device gets several pieces of at most PIECE_ROWS rather than one: the copy is never
larger than a piece. Pieces of one device are searched one after another (a GPU's FAISS resources serve one thread), devices
at the same time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import faiss
import numpy as np

from services.contract.telemetry import Progress
from services.retriever.errors import RetrieverError
from services.retriever.flat_file import chunks, map_flat

PIECE_ROWS = 1 << 21
MakePiece = Callable[[int, int], faiss.Index]
"""An empty float16 index of a dimension on a device."""


def load_on_gpus(path: Path) -> faiss.Index:
    """A Flat index on every visible GPU. Raises RetrieverError without GPUs, IndexMismatch when the file is not whole and flat."""
    count = gpu_count()
    return load_sharded(map_flat(path), range(count), gpu_pieces())


def gpu_count() -> int:
    if not hasattr(faiss, "StandardGpuResources"):
        raise RetrieverError(
            f'retriever.index_device is "cuda", but this FAISS {faiss.__version__} is built without GPUs: '
            'install faiss-gpu instead of faiss-cpu, or set "cpu"'
        )
    if (count := faiss.get_num_gpus()) == 0:
        raise RetrieverError('retriever.index_device is "cuda", but FAISS sees no GPU: give the container one, or set "cpu"')
    return count


def gpu_pieces() -> MakePiece:
    resources: dict[int, Any] = {}

    def make(dimension: int, device: int) -> faiss.Index:
        gpu: Any = faiss  # names that only a FAISS for GPUs has
        settings = gpu.GpuIndexFlatConfig()
        settings.useFloat16, settings.device = True, device
        if device not in resources:  # one set a device: each reserves memory
            resources[device] = gpu.StandardGpuResources()
        piece = gpu.GpuIndexFlatIP(resources[device], dimension, settings)
        piece.referenced_objects = [resources[device]]  # FAISS keeps a bare pointer
        return piece

    return make


def load_sharded(vectors: np.ndarray, devices: Sequence[int], make: MakePiece, piece_rows: int = PIECE_ROWS) -> faiss.Index:
    """float32 [rows, dimension] as one index with the same row numbers, in equal parts on `devices`."""
    dimension = vectors.shape[1]
    whole = _shards(dimension, threaded=True)
    bounds = np.linspace(0, len(vectors), len(devices) + 1).astype(int)
    with Progress("loading the index onto its devices", len(vectors), "passages") as bar:
        for device, start, stop in zip(devices, bounds[:-1].tolist(), bounds[1:].tolist(), strict=True):
            part = _shards(dimension, threaded=False)
            for begin in range(start, stop, piece_rows):
                _append(part, _filled(make(dimension, device), vectors, begin, min(begin + piece_rows, stop), bar))
            _append(whole, part)
    return whole


def _filled(piece: faiss.Index, vectors: np.ndarray, start: int, stop: int, bar: Progress) -> faiss.Index:
    for chunk in chunks(vectors, start, stop):
        if not piece.is_trained:  # float16 needs none, FAISS asks for the call all the same
            piece.train(chunk)
        piece.add(chunk)
        bar.advance(len(chunk))
    return piece


def _shards(dimension: int, threaded: bool) -> faiss.IndexShards:
    """Row numbers go on from one shard to the next."""
    shards = faiss.IndexShards(dimension, threaded, True)  # pyright: ignore[reportCallIssue]
    shards.metric_type = faiss.METRIC_INNER_PRODUCT
    return shards


def _append(shards: faiss.IndexShards, shard: faiss.Index) -> None:
    shards.add_shard(shard)  # the Python wrapper keeps a reference to it
