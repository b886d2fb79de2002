"""`index import`: a published FAISS index, in one file or in parts, becomes this run's, if it is of this corpus and encoder.

One file is linked, not copied, where it lies on the same file system. Parts are joined straight into the index folder (file
systems that can share blocks do) and stay where they are, for they are yours: `--remove-parts` deletes them once the index
stands. What its header tells is checked before anything is copied, the rest before the manifest of an earlier index is touched:
a refused import leaves everything as it was, the parts too.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from pathlib import Path

from services.contract.config import Config
from services.contract.files import sync
from services.contract.telemetry import Progress
from services.retriever.check import content_problems
from services.retriever.corpus import Corpus
from services.retriever.encoder import describe_encoder, load_encoder
from services.retriever.errors import IndexMismatch, RetrieverError
from services.retriever.families import EncoderDescription
from services.retriever.files import need_room, sole_writer, written_whole
from services.retriever.flat_file import HEADER, flat_header
from services.retriever.index import FaissIndex, kind, new_index
from services.retriever.manifest import (
    Identity,
    Manifest,
    corpus_digest,
    identify,
    index_path,
    make_manifest,
    manifest_path,
    readable_manifest,
    write_manifest,
)

log = logging.getLogger("retriever")

COPY_BYTES = 64 << 20


def import_index(config: Config, parts: Sequence[Path], remove_parts: bool = False) -> Manifest:
    """Adopt the index that `parts`, one after another, are. Raises IndexMismatch naming what does not fit."""
    folder = config.data.index_folder
    with sole_writer(folder):
        corpus, encoder = Corpus.open(config.data.corpus_path), describe_encoder(config, "passage")
        identity = identify(encoder, corpus, corpus_digest(corpus.path, readable_manifest(folder, Manifest)))
        manifest = adopt(config, parts, corpus, encoder, identity)
        if remove_parts:
            _remove(parts, keep=index_path(folder))
        return manifest


def adopt(config: Config, parts: Sequence[Path], corpus: Corpus, encoder: EncoderDescription, identity: Identity) -> Manifest:
    """As `import_index`, by who already is the index folder's sole writer."""
    folder = config.data.index_folder
    for part in parts:
        if not part.is_file():
            raise RetrieverError(f"{part}: no such file; give the index file, or its parts in their order")
    _check_header(parts, len(corpus), encoder.dimension)
    with written_whole(index_path(folder)) as temporary:
        _bring(parts, temporary)
        _check_content(config, temporary, encoder, corpus)
        manifest_path(folder).unlink(missing_ok=True)
        sync(folder)
    manifest = make_manifest(folder, identity, corpus, encoder.name, config.retriever.index_factory, imported=True)
    write_manifest(folder, manifest)
    log.info("index imported: %s passages, dimension %d, %s", f"{len(corpus):,}", identity.dimension, manifest.factory)
    return manifest


def _remove(parts: Sequence[Path], keep: Path) -> None:
    """The parts, and what they are links to, as in a hub's cache. The index that was imported over itself stays."""
    for path in {place for part in parts for place in (part, part.resolve())} - {keep, keep.resolve()}:
        try:
            path.unlink(missing_ok=True)
        except OSError as error:
            log.warning("%s could not be removed (%s); the index does not need it any more: remove it yourself", path, error)


def _check_header(parts: Sequence[Path], rows: int, dimension: int) -> None:
    """What a flat index tells in its first bytes; of other kinds nothing is known yet."""
    with parts[0].open("rb") as file:
        header = flat_header(file.read(HEADER.size), parts[0])
    if header is None:
        return
    size, name = sum(part.stat().st_size for part in parts), ", ".join(part.name for part in parts)
    problems = []
    if header.rows != rows:
        problems.append(f"rows: {header.rows:,} in the index, {rows:,} in the corpus; set data.corpus to the one it was built from")
    if header.dimension != dimension:
        problems.append(f"dimension: {header.dimension} in the index, {dimension} from the encoder; set retriever.encoder")
    if size != header.file_bytes:
        problems.append(f"size: {size:,} bytes, its header says {header.file_bytes:,} (a part is missing or cut short)")
    if problems:
        raise IndexMismatch(f"{name}: this index cannot be imported: {'; '.join(problems)}")


def _bring(parts: Sequence[Path], target: Path) -> None:
    target.unlink(missing_ok=True)
    if len(parts) == 1:
        try:
            target.hardlink_to(parts[0].resolve())
            return
        except OSError:  # another file system, or one without links
            pass
    size = sum(part.stat().st_size for part in parts)
    need_room(target.parent, size, "the imported index")
    with target.open("wb") as out, Progress("copying the index", size, "bytes") as bar:
        for part in parts:
            with part.open("rb") as file:
                while copied := _copy(file.fileno(), out.fileno()):
                    bar.advance(copied)


def _copy(source: int, target: int) -> int:
    """Bytes copied, 0 at the end. The kernel shares the blocks where the file system can."""
    try:
        return os.copy_file_range(source, target, COPY_BYTES)
    except OSError:  # between some file systems it is not possible
        return os.write(target, os.read(source, COPY_BYTES))


def _check_content(config: Config, path: Path, description: EncoderDescription, corpus: Corpus) -> None:
    settings = config.retriever
    index = FaissIndex.load(path, settings.threads, settings.index_search, mmap=True)
    wanted = kind(new_index(settings.index_factory, description.dimension))
    problems = []
    if index.kind != wanted:
        problems = [
            f"factory: the file is {index.kind}, retriever.index_factory {settings.index_factory!r} makes {wanted}; "
            "set it to what the index was built with"
        ]
    problems = problems or content_problems(index, load_encoder(description, settings.threads), corpus)
    if problems:
        raise IndexMismatch(f"{path.name.removesuffix('.tmp')}: this index cannot be imported: {'; '.join(problems)}")
