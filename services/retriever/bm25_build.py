"""`index build` for BM25: corpus to Lucene index, skipped when it is there, whole and matching.

| on disk, in `<data.directory>/bm25`                  | means                                  | the next build    |
|------------------------------------------------------|----------------------------------------|-------------------|
| manifest.json, all fields equal; lucene/ undamaged   | whole                                  | does nothing      |
| lucene.part/                                         | killed while indexing                  | starts over       |
| lucene/ without manifest.json                        | killed just before the end             | starts over       |
| anything else                                        | of another corpus or Lucene, or broken | starts over       |

The manifest is removed first and written last, so that nothing in between looks whole. A document's id in Lucene is its
row in the corpus; its text is served from there.
"""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import closing
from itertools import islice
from pathlib import Path

import msgspec

from services.contract.config import Config
from services.contract.files import move_into_place, sync
from services.contract.telemetry import Progress
from services.retriever.corpus import Corpus
from services.retriever.errors import IndexMismatch, RetrieverError
from services.retriever.files import sole_writer
from services.retriever.lucene import ANALYZER, LuceneIndex, LuceneWriter, start_jvm, versions
from services.retriever.manifest import corpus_digest, manifest_path, readable_manifest, write_manifest

log = logging.getLogger("retriever")

FORMAT = 1
CHUNK_ROWS = 1000
"""Passages handed to Java together."""
BLANK = "".join(map(chr, range(33)))
"""What Java's `trim` takes away."""


class Bm25Identity(msgspec.Struct, frozen=True, kw_only=True):
    """All that decides the index. k1 and b are not in it: they count when it is searched."""

    rows: int
    corpus_sha256: str
    analyzer: str = ANALYZER
    pyserini: str
    lucene: str
    format: int = FORMAT


class Bm25Manifest(Bm25Identity, frozen=True, kw_only=True):
    corpus_bytes: int
    corpus_mtime_ns: int


def build_bm25(config: Config) -> None:
    """Make `<data.directory>/bm25` from the corpus if it is not there. Raises RetrieverError."""
    folder = bm25_folder(config)
    with sole_writer(folder):
        corpus = Corpus.open(config.data.corpus_path)
        start_jvm(config.retriever.bm25.heap)
        known = readable_manifest(folder, Bm25Manifest)
        wanted = identify_bm25(corpus, corpus_digest(corpus.path, known))
        reasons = _reasons_to_build(folder, known, wanted)
        if not reasons:
            log.info("BM25 index at %s is whole and matches (%s passages): nothing to do", folder, f"{len(corpus):,}")
            return
        log.info("building the BM25 index at %s: %s", folder, "; ".join(reasons))
        _build(config, folder, corpus, wanted)


def _build(config: Config, folder: Path, corpus: Corpus, identity: Bm25Identity) -> None:
    stamp = corpus.path.stat()
    _clear(folder)
    part = folder / "lucene.part"
    threads = config.retriever.index_threads or len(os.sched_getaffinity(0))
    write_index(corpus, part, threads, buffer_mb(config.retriever.bm25.heap))
    (part / "write.lock").unlink(missing_ok=True)
    problem = lucene_problem(part, len(corpus))
    if problem:
        raise RetrieverError(f"{problem} Free some room or move data.directory, then run `index build` again")
    move_into_place(part, lucene_folder(folder))
    fields = msgspec.structs.asdict(identity)
    manifest = Bm25Manifest(**fields, corpus_bytes=stamp.st_size, corpus_mtime_ns=stamp.st_mtime_ns)
    write_manifest(folder, manifest)
    log.info("BM25 index written: %s passages, Lucene %s", f"{len(corpus):,}", manifest.lucene)


def _clear(folder: Path) -> None:
    manifest_path(folder).unlink(missing_ok=True)
    sync(folder)
    for name in ("lucene", "lucene.part"):
        shutil.rmtree(folder / name, ignore_errors=True)


def write_index(corpus: Corpus, folder: Path, threads: int, buffer_mb: int) -> None:
    """Raises CorpusError at a row that is no passage, RetrieverError when Lucene does not take one."""
    folder.mkdir()
    writer = LuceneWriter(folder, threads, buffer_mb)
    with Progress("indexing for BM25", len(corpus), "passages") as bar:
        for documents in _chunks(corpus):
            taken = writer.add(documents)
            if taken != len(documents):
                raise RetrieverError(
                    f"{folder}: Lucene took {taken} of the passages in rows {documents[0][0]} to {documents[-1][0]}; "
                    "free some room or move data.directory, then run `index build` again"
                )
            bar.advance(taken)
    log.info("merging the BM25 index into one segment")
    writer.close()


def _chunks(corpus: Corpus) -> Iterator[list[tuple[str, str]]]:
    """Row and text. A blank text becomes a full stop, without terms as well: Lucene would leave the passage out and the
    number of documents could not be checked against the corpus."""
    documents = ((str(row), text if (text := corpus.contents(row)).strip(BLANK) else ".") for row in range(len(corpus)))
    while chunk := list(islice(documents, CHUNK_ROWS)):
        yield chunk


def buffer_mb(heap: str) -> int:
    """MiB that Lucene gathers before it writes a segment: a quarter of the heap, 1 to 512."""
    mebibytes = int(heap[:-1]) * {"m": 1, "g": 1024}[heap[-1].lower()]
    return min(max(mebibytes // 4, 1), 512)


# -- what is there -----------------------------------------------------------------------------------------------------


def bm25_folder(config: Config) -> Path:
    return config.data.directory / "bm25"


def lucene_folder(folder: Path) -> Path:
    return folder / "lucene"


def identify_bm25(corpus: Corpus, digest: str) -> Bm25Identity:
    """The JVM must run."""
    now = versions()
    return Bm25Identity(rows=len(corpus), corpus_sha256=digest, pyserini=now["pyserini"], lucene=now["lucene"])


def _reasons_to_build(folder: Path, known: Bm25Manifest | None, wanted: Bm25Identity) -> list[str]:
    if known is None:
        return ["there is none"]
    if problems := bm25_differences(known, wanted):
        return problems
    problem = lucene_problem(lucene_folder(folder), wanted.rows)
    return [problem] if problem else []


def bm25_differences(found: Bm25Identity, wanted: Bm25Identity) -> list[str]:
    """One phrase for each field that differs."""
    values = {name: (getattr(found, name), getattr(wanted, name)) for name in Bm25Identity.__struct_fields__}
    return [
        f"{name} is {_short(there)} in the index, {_short(here)} now" for name, (there, here) in values.items() if there != here
    ]


def _short(value: object) -> str:
    """Twelve digits of a digest are enough for a person."""
    return f"{value[:12]}…" if isinstance(value, str) and len(value) == 64 else repr(value)


def lucene_problem(folder: Path, rows: int) -> str | None:
    """What is wrong with the files of an index that should hold `rows` documents; None when all is well."""
    try:
        index = LuceneIndex(folder, k1=0.9, b=0.4, mend="")
        with closing(index):
            documents = len(index)
            index.check_integrity("")
    except IndexMismatch as error:
        return str(error).strip()
    return None if documents == rows else f"{folder}: {documents} documents in the index, {rows} passages in the corpus."
