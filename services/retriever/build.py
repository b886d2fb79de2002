"""`index`: corpus to embeddings to FAISS index, each step skipped when its output is there, whole and matching.

| on disk                                              | means                            | the next `index`             |
|------------------------------------------------------|----------------------------------|------------------------------|
| manifest.json, index.faiss, all fields equal         | whole                            | does nothing                 |
| embeddings.json, embeddings.npy.part                 | killed while encoding            | goes on from the checkpoint  |
| embeddings.json complete, embeddings.npy             | killed while indexing, or        | encodes nothing, fills the   |
|                                                      | another index_factory is wanted  | index                        |
| anything else                                        | of another corpus or encoder     | starts over                  |

The manifest is removed first and written last, so that nothing in between looks whole.
"""

from __future__ import annotations

import logging
import os
import time
from pathlib import Path

import msgspec
import numpy as np

from services.contract.config import Config
from services.contract.telemetry import Progress
from services.retriever.corpus import Corpus
from services.retriever.encoder import EncoderDescription, describe_encoder, load_encoder
from services.retriever.errors import IndexMismatch, RetrieverError
from services.retriever.files import publish, sha256, sole_writer, sync, write_whole
from services.retriever.manifest import (
    Identity,
    Manifest,
    check_index_file,
    corpus_digest,
    identify,
    index_path,
    index_problems,
    manifest_path,
    read_manifest,
    write_manifest,
)

log = logging.getLogger("retriever")

BATCH_ROWS = 64
"""Passages encoded together, and the grain of resuming: it must not change with the number of threads."""


class EmbeddingState(msgspec.Struct, frozen=True):
    """How far `embeddings.npy` is: the first `batches_done` of the plan for `identity` are on disk."""

    identity: Identity
    batches_done: int


def build_index(config: Config) -> Manifest:
    """Make the index of `config` if it is not there. Raises RetrieverError."""
    folder = config.data.index_folder
    with sole_writer(folder):
        corpus = Corpus.open(config.data.corpus_path)
        encoder = describe_encoder(config)
        known = _readable_manifest(folder)
        identity = identify(encoder, corpus, corpus_digest(corpus.path, known))
        problems = _reasons_to_build(config, known, identity)
        if known and not problems:
            log.info("index at %s is whole and matches (%s passages, %s): nothing to do", folder, f"{len(corpus):,}", known.factory)
            return known
        log.info("building the index at %s: %s", folder, "; ".join(problems))
        return _build(config, corpus, encoder, identity)


def _readable_manifest(folder: Path) -> Manifest | None:
    try:
        return read_manifest(folder)
    except IndexMismatch:
        return None


def _reasons_to_build(config: Config, known: Manifest | None, identity: Identity) -> list[str]:
    folder = config.data.index_folder
    if known is None:
        return ["there is none"]
    return index_problems(folder, known, identity, config.retriever.index_factory) or check_index_file(folder, known)


def _build(config: Config, corpus: Corpus, encoder: EncoderDescription, identity: Identity) -> Manifest:
    from services.retriever.index import new_index  # faiss

    folder, factory = config.data.index_folder, config.retriever.index_factory
    new_index(factory, identity.dimension)  # refuse a bad factory string before hours of encoding
    with Progress("checking the corpus", len(corpus), "passages") as bar:
        corpus.check_rows(on_row=bar.advance)
    manifest_path(folder).unlink(missing_ok=True)
    sync(folder)
    embeddings = embed(config, corpus, encoder, identity)
    _write_index(config, embeddings)
    stamp = corpus.path.stat()
    manifest = Manifest(
        **msgspec.structs.asdict(identity),
        encoder=encoder.name,
        factory=factory,
        corpus_bytes=stamp.st_size,
        corpus_mtime_ns=stamp.st_mtime_ns,
        index_bytes=index_path(folder).stat().st_size,
        index_sha256=sha256(index_path(folder)),
    )
    write_manifest(folder, manifest)
    log.info("index written: %s passages, dimension %d, %s", f"{len(corpus):,}", identity.dimension, factory)
    return manifest


def _write_index(config: Config, embeddings: np.ndarray) -> None:
    from services.retriever.index import fill_index  # faiss

    final = index_path(config.data.index_folder)
    temporary = final.with_name("index.faiss.tmp")
    fill_index(config.retriever.index_factory, embeddings, build_threads(config)).save(temporary)
    publish(temporary, final)


def build_threads(config: Config) -> int:
    return config.retriever.index_threads or len(os.sched_getaffinity(0))


def embed(config: Config, corpus: Corpus, description: EncoderDescription, identity: Identity) -> np.ndarray:
    """float32 [rows, dimension], memory-mapped; resumes at the last checkpoint of a run that was killed."""
    folder, shape = config.data.index_folder, (identity.rows, identity.dimension)
    final, part = folder / "embeddings.npy", folder / "embeddings.npy.part"
    batches = plan_batches(corpus.lengths())
    done = _batches_done(folder, identity)
    if done == len(batches) and final.exists():
        log.info("embeddings of the same corpus and encoder are there: used again")
        return np.load(final, mmap_mode="r")
    if done and part.exists():
        log.info("resuming the embeddings: %d of %d batches were done", done, len(batches))
        vectors = np.lib.format.open_memmap(part, mode="r+")
    else:
        done, vectors = 0, _start_over(folder, identity, shape)
    _encode(config, corpus, description, identity, vectors, batches, done)
    publish(part, final)
    return np.load(final, mmap_mode="r")


def plan_batches(lengths: np.ndarray) -> list[np.ndarray]:
    """Rows in batches of like length, so that little is padded; batches shuffled, so that the ETA is honest.

    The same corpus always gives the same plan: a count of finished batches is enough to resume.
    """
    order = np.argsort(lengths, kind="stable")
    batches = [order[start : start + BATCH_ROWS] for start in range(0, len(order), BATCH_ROWS)]
    return [batches[i] for i in np.random.default_rng(0).permutation(len(batches))]


def _batches_done(folder: Path, identity: Identity) -> int:
    try:
        state = msgspec.json.decode((folder / "embeddings.json").read_bytes(), type=EmbeddingState)
    except (FileNotFoundError, msgspec.DecodeError):
        return 0
    return state.batches_done if state.identity == identity else 0


def _save_state(folder: Path, identity: Identity, batches_done: int) -> None:
    write_whole(folder / "embeddings.json", msgspec.json.encode(EmbeddingState(identity, batches_done)))


def _start_over(folder: Path, identity: Identity, shape: tuple[int, int]) -> np.memmap:
    """An empty file of full size. The room is reserved: a full disk shows now, and not as a crash on a later write."""
    for name in ("embeddings.json", "embeddings.npy", "embeddings.npy.part", "index.faiss"):
        (folder / name).unlink(missing_ok=True)
    part = folder / "embeddings.npy.part"
    vectors = np.lib.format.open_memmap(part, mode="w+", dtype=np.float32, shape=shape)
    try:
        with part.open("r+b") as file:
            os.posix_fallocate(file.fileno(), 0, part.stat().st_size)
    except OSError as error:
        size = part.stat().st_size
        part.unlink()
        raise RetrieverError(
            f"{part}: no room for {size:,} bytes of embeddings ({error}); free some or move data.directory"
        ) from error
    _save_state(folder, identity, 0)
    return vectors


def _encode(
    config: Config,
    corpus: Corpus,
    description: EncoderDescription,
    identity: Identity,
    vectors: np.memmap,
    batches: list[np.ndarray],
    done: int,
) -> None:
    encoder = load_encoder(description, build_threads(config))
    if encoder.dimension != identity.dimension:
        raise RetrieverError(
            f"{description.folder}: the model gives {encoder.dimension} numbers, its config.json says {identity.dimension}"
        )
    with Progress("encoding passages", sum(map(len, batches[done:])), "passages") as bar:
        saved = time.monotonic()
        for number, rows in enumerate(batches[done:], start=done + 1):
            encoded = encoder.encode([corpus.contents(int(row)) for row in rows], "passage")
            if not np.isfinite(encoded).all():
                raise RetrieverError(f"{description.folder}: the encoder gave a number that is not finite for rows {rows.tolist()}")
            vectors[rows] = encoded
            bar.advance(len(rows))
            if time.monotonic() - saved >= config.retriever.index_checkpoint_s or number == len(batches):
                vectors.flush()
                _save_state(config.data.index_folder, identity, number)
                saved = time.monotonic()
