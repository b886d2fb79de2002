"""The corpus as vectors: `embeddings.npy`, float32 [rows, dimension], in corpus order.

Batches (`batches.py`) are encoded here or by workers (`workers.py`); a bit for each tells what is done.

| file                     | holds                                                                     |
|--------------------------|---------------------------------------------------------------------------|
| `embeddings.npy.part`    | the vectors, full size from the start, so that a full disk shows at once   |
| `embeddings.json`        | of what, and which batches are in; written after the vectors are synced    |
| `embeddings.npy`         | the finished vectors: the renamed part                                    |
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import msgspec
import numpy as np

from services.contract.config import Config
from services.contract.files import move_into_place, sync
from services.contract.telemetry import Progress
from services.retriever.batches import BATCH_ROWS, Plan
from services.retriever.corpus import Corpus
from services.retriever.errors import RetrieverError
from services.retriever.families import EncoderDescription
from services.retriever.files import write_whole
from services.retriever.manifest import Identity
from services.retriever.workers import encode_here, encode_in_workers

log = logging.getLogger("retriever")

TASK_BATCHES = {"cpu": 1, "cuda": 8}
"""Neighbouring batches encoded in one go: a GPU wants 512 texts."""


class EmbeddingState(msgspec.Struct, frozen=True):
    """Which batches of the plan for `identity` are on disk."""

    identity: Identity
    batches_done: int
    done: bytes
    """A bit a batch, in their order."""


def embed(config: Config, corpus: Corpus, description: EncoderDescription, identity: Identity) -> np.ndarray:
    """float32 [rows, dimension], memory-mapped; resumes at the last checkpoint of a run that was killed.

    Raises RetrieverError, naming the file, when there is no room or what is there is truncated.
    """
    folder, shape = config.data.index_folder, (identity.rows, identity.dimension)
    final, part = folder / "embeddings.npy", folder / "embeddings.npy.part"
    done = _batches_done(folder, identity, Plan(corpus).batches)
    if done.all() and final.exists():
        log.info("embeddings of the same corpus and encoder are there: used again")
        return _map(final, shape)
    if done.any() and part.exists():
        _map(part, shape)  # numpy would fill up a truncated file with zeros
        log.info("resuming the embeddings: %d of %d batches were done", done.sum(), len(done))
    else:
        done[:] = False
        _start_over(folder, identity, shape, done)
    _encode(config, corpus, description, identity, done)
    move_into_place(part, final)
    return _map(final, shape)


def _encode(config: Config, corpus: Corpus, description: EncoderDescription, identity: Identity, done: np.ndarray) -> None:
    folder, settings = config.data.index_folder, config.retriever
    part = folder / "embeddings.npy.part"
    tasks = Plan(corpus).tasks(done, TASK_BATCHES[description.device])
    threads = settings.index_threads or len(os.sched_getaffinity(0))
    if settings.index_workers > 1:
        finished = encode_in_workers(tasks, settings.index_workers, corpus.path, description, part, threads)
    else:
        finished = encode_here(tasks, corpus, description, part, threads)
    left = BATCH_ROWS * int((~done).sum())
    with Progress("encoding passages", min(left, len(corpus)), "passages") as bar:
        _record(finished, done, bar, settings.index_checkpoint_s, lambda: _save(folder, identity, done))


def _record(finished: Iterable[list[int]], done: np.ndarray, bar: Progress, every_s: float, save: Callable[[], None]) -> None:
    """Marks batches as they are finished. What is done is kept even when the rest fails."""
    saved = time.monotonic()
    try:
        for task in finished:
            done[task] = True
            bar.advance(min(len(task) * BATCH_ROWS, bar.total - bar.done))
            if time.monotonic() - saved >= every_s:
                save()
                saved = time.monotonic()
    finally:
        save()


def _map(path: Path, shape: tuple[int, int]) -> np.ndarray:
    try:
        vectors = np.load(path, mmap_mode="r")
    except (ValueError, EOFError) as error:
        raise RetrieverError(f"{path}: not whole ({error}); remove it, and it is encoded again") from None
    if vectors.shape != shape or vectors.dtype != np.float32:
        raise RetrieverError(
            f"{path}: {vectors.dtype} {vectors.shape}, float32 {shape} expected; remove it, and it is encoded again"
        )
    return vectors


def _batches_done(folder: Path, identity: Identity, batches: int) -> np.ndarray:
    """bool [batches]; all False unless the state is of `identity`."""
    try:
        state = msgspec.json.decode((folder / "embeddings.json").read_bytes(), type=EmbeddingState)
    except (FileNotFoundError, msgspec.DecodeError):
        return np.zeros(batches, bool)
    if state.identity != identity or len(state.done) != -(-batches // 8):
        return np.zeros(batches, bool)
    return np.unpackbits(np.frombuffer(state.done, np.uint8), count=batches).astype(bool)


def _save(folder: Path, identity: Identity, done: np.ndarray) -> None:
    """The vectors first: a batch that is marked must be on disk."""
    sync(folder / "embeddings.npy.part")
    state = EmbeddingState(identity, int(done.sum()), np.packbits(done).tobytes())
    write_whole(folder / "embeddings.json", msgspec.json.encode(state))


def _start_over(folder: Path, identity: Identity, shape: tuple[int, int], done: np.ndarray) -> None:
    """An empty file of full size. The room is reserved: a full disk shows now, and not as a crash on a later write."""
    for name in ("embeddings.json", "embeddings.npy", "embeddings.npy.part", "index.faiss"):
        (folder / name).unlink(missing_ok=True)
    part, size = folder / "embeddings.npy.part", 4 * shape[0] * shape[1]
    try:
        np.lib.format.open_memmap(part, mode="w+", dtype=np.float32, shape=shape)
        with part.open("r+b") as file:
            os.posix_fallocate(file.fileno(), 0, part.stat().st_size)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise RetrieverError(
            f"{part}: no room for {size:,} bytes of embeddings ({error}); free some or move data.directory"
        ) from error
    _save(folder, identity, done)
