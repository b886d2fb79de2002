"""`index build`: corpus to embeddings to FAISS index, each step skipped when its output is there, whole and matching.

Where `data.index` names a published index, that one is adopted instead (see `adopt`).

| on disk                                              | means                            | the next `index build`       |
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

import numpy as np

from services.contract.config import Config
from services.contract.files import sync
from services.contract.telemetry import Progress
from services.retriever.corpus import Corpus
from services.retriever.embed import embed
from services.retriever.encoder import describe_encoder
from services.retriever.families import EncoderDescription
from services.retriever.files import need_room, sole_writer, written_whole
from services.retriever.manifest import (
    Identity,
    Manifest,
    check_index_file,
    corpus_digest,
    identify,
    index_path,
    index_problems,
    make_manifest,
    manifest_path,
    readable_manifest,
    write_manifest,
)

log = logging.getLogger("retriever")


def build_index(config: Config) -> Manifest:
    """Make the index of `config` if it is not there. Raises RetrieverError."""
    folder = config.data.index_folder
    with sole_writer(folder):
        corpus = Corpus.open(config.data.corpus_path)
        encoder = describe_encoder(config, "passage")
        known = readable_manifest(folder, Manifest)
        identity = identify(encoder, corpus, corpus_digest(corpus.path, known))
        problems = _reasons_to_build(config, known, identity)
        if known and not problems:
            log.info("index at %s is whole and matches (%s passages, %s): nothing to do", folder, f"{len(corpus):,}", known.factory)
            return known
        log.info("making the index at %s: %s", folder, "; ".join(problems))
        if parts := config.data.index_parts:
            from services.retriever.adopt import adopt  # faiss

            return adopt(config, parts, corpus, encoder, identity)
        return _build(config, corpus, encoder, identity)


def _reasons_to_build(config: Config, known: Manifest | None, identity: Identity) -> list[str]:
    folder = config.data.index_folder
    if known is None:
        return ["there is none"]
    return index_problems(folder, known, identity, config.retriever.index_factory) or check_index_file(folder, known)


def _build(config: Config, corpus: Corpus, encoder: EncoderDescription, identity: Identity) -> Manifest:
    from services.retriever.index import new_index, set_search  # faiss

    folder, settings = config.data.index_folder, config.retriever
    # Refuse bad strings before hours of encoding.
    set_search(new_index(settings.index_factory, identity.dimension), settings.index_search)
    with Progress("checking the corpus", len(corpus), "passages") as bar:
        corpus.check_rows(on_row=bar.advance)
    manifest_path(folder).unlink(missing_ok=True)
    sync(folder)
    embeddings = embed(config, corpus, encoder, identity)
    _write_index(config, embeddings)
    manifest = make_manifest(folder, identity, corpus, encoder.name, settings.index_factory)
    write_manifest(folder, manifest)
    log.info("index written: %s passages, dimension %d, %s", f"{len(corpus):,}", identity.dimension, manifest.factory)
    return manifest


def _write_index(config: Config, embeddings: np.ndarray) -> None:
    """A Flat index goes straight to the file; other kinds are filled in memory, in chunks, as FAISS demands."""
    from services.retriever.flat_file import write_flat
    from services.retriever.index import fill_index  # faiss

    final, factory = index_path(config.data.index_folder), config.retriever.index_factory
    final.unlink(missing_ok=True)  # its room is needed
    if factory == "Flat":
        need_room(final.parent, embeddings.nbytes, "the index")
        with written_whole(final) as temporary:
            write_flat(temporary, embeddings)
        return
    index = fill_index(factory, embeddings, build_threads(config))
    with written_whole(final) as temporary:
        index.save(temporary)


def build_threads(config: Config) -> int:
    return config.retriever.index_threads or len(os.sched_getaffinity(0))
