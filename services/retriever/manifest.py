"""What an index was built from. `manifest.json` is written last: without it, or with other sizes, there is no index.

An index is used only if every field that decides its vectors equals what the configuration gives now; the refusal
names the fields that differ. The corpus digest is taken from the manifest while size and time stamp are unchanged.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Protocol, TypeVar

import msgspec

from services.contract.files import file_digest
from services.contract.telemetry import Progress
from services.retriever.corpus import Corpus
from services.retriever.errors import IndexMismatch
from services.retriever.families import EncoderDescription
from services.retriever.files import write_whole

M = TypeVar("M", bound=msgspec.Struct)
METRIC = "inner_product"
FORMAT = 1


class Identity(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=False):
    """All that decides the embeddings."""

    encoder_digest: str
    family: str
    query_prefix: str
    passage_prefix: str
    pooling: str
    normalized: bool
    max_tokens: int
    dimension: int
    rows: int
    corpus_sha256: str


class Manifest(Identity, frozen=True, kw_only=True):
    encoder: str
    """The encoder's name, for people; its digest is what counts."""
    factory: str
    metric: str = METRIC
    format: int = FORMAT
    corpus_bytes: int
    corpus_mtime_ns: int
    index_bytes: int
    index_mtime_ns: int = 0
    """Only lets a mapped index open at once; another time stamp is no fault, the digest decides then."""
    index_sha256: str
    imported: bool = False
    """Adopted by `index import`, not built here."""


MENDS = {
    "encoder_digest": "retriever.encoder, or passage_encoder, names another model than the index was built with",
    "family": "retriever.encoder_family",
    "max_tokens": "retriever.encoder_max_tokens",
    "factory": "retriever.index_factory",
    "corpus_sha256": "the corpus has changed since",
    "rows": "the corpus has changed since",
}


def identify(encoder: EncoderDescription, corpus: Corpus, corpus_sha256: str) -> Identity:
    family = encoder.family
    return Identity(
        encoder_digest=encoder.digest,
        family=family.name,
        query_prefix=family.query_prefix,
        passage_prefix=family.passage_prefix,
        pooling=family.pooling,
        normalized=family.normalized,
        max_tokens=encoder.max_tokens,
        dimension=encoder.dimension,
        rows=len(corpus),
        corpus_sha256=corpus_sha256,
    )


class CorpusStamp(Protocol):
    """What a manifest remembers of the corpus file."""

    @property
    def corpus_sha256(self) -> str: ...

    @property
    def corpus_bytes(self) -> int: ...

    @property
    def corpus_mtime_ns(self) -> int: ...


def corpus_digest(path: Path, manifest: CorpusStamp | None, on_bytes: Callable[[int], None] | None = None) -> str:
    """From the manifest while the file is visibly the same one; otherwise read in full."""
    now = path.stat()
    if manifest and (manifest.corpus_bytes, manifest.corpus_mtime_ns) == (now.st_size, now.st_mtime_ns):
        return manifest.corpus_sha256
    return file_digest(path, on_bytes)


def differences(found: Identity, wanted: Identity) -> list[str]:
    """One phrase for each field of `wanted` that differs, most telling first."""
    texts = []
    for field in Identity.__struct_fields__:
        there, here = getattr(found, field), getattr(wanted, field)
        if there != here:
            texts.append(_difference(field, there, here))
    return texts


def _difference(field: str, there: object, here: object) -> str:
    note = f" ({MENDS[field]})" if field in MENDS else ""
    return f"{field} is {_short(there)} in the index, {_short(here)} now{note}"


def _short(value: object) -> str:
    """Twelve digits of a digest are enough for a person."""
    return f"{value[:12]}…" if isinstance(value, str) and len(value) == 64 else repr(value)


def index_problems(folder: Path, manifest: Manifest, wanted: Identity, factory: str) -> list[str]:
    """Everything that makes the index unusable, cheap checks only; see `check_index_file` for the digest."""
    problems = differences(manifest, wanted)
    if manifest.factory != factory:
        problems.append(_difference("factory", manifest.factory, factory))
    if manifest.metric != METRIC or manifest.format != FORMAT:
        problems.append(f"metric {manifest.metric!r}, format {manifest.format} in the index, {METRIC!r} and {FORMAT} now")
    size = index_path(folder).stat().st_size if index_path(folder).exists() else 0
    if size != manifest.index_bytes:
        problems.append(f"index_bytes is {manifest.index_bytes} in the manifest, {size} on disk (truncated or missing)")
    return problems


def make_manifest(folder: Path, identity: Identity, corpus: Corpus, encoder: str, factory: str, imported: bool = False) -> Manifest:
    """Of the index file that lies in `folder`; reads it for its digest."""
    stamp, of_corpus = index_path(folder).stat(), corpus.path.stat()
    with Progress("reading the index for its digest", stamp.st_size, "bytes") as bar:
        digest = file_digest(index_path(folder), bar.advance)
    return Manifest(
        **msgspec.structs.asdict(identity),
        encoder=encoder,
        factory=factory,
        corpus_bytes=of_corpus.st_size,
        corpus_mtime_ns=of_corpus.st_mtime_ns,
        index_bytes=stamp.st_size,
        index_mtime_ns=stamp.st_mtime_ns,
        index_sha256=digest,
        imported=imported,
    )


def looks_untouched(folder: Path, manifest: Manifest) -> bool:
    """Size and time stamp of the index file are the manifest's."""
    stamp = index_path(folder).stat()
    return (stamp.st_size, stamp.st_mtime_ns) == (manifest.index_bytes, manifest.index_mtime_ns)


def check_index_file(folder: Path, manifest: Manifest, on_bytes: Callable[[int], None] | None = None) -> list[str]:
    digest = file_digest(index_path(folder), on_bytes)
    return [] if digest == manifest.index_sha256 else [_difference("index_sha256", manifest.index_sha256, digest)]


def index_path(folder: Path) -> Path:
    return folder / "index.faiss"


def manifest_path(folder: Path) -> Path:
    return folder / "manifest.json"


def read_manifest(folder: Path, kind: type[M], mend: str) -> M | None:
    """None when there is none: no index, or one whose building was cut short. Raises IndexMismatch, ending in `mend`."""
    try:
        return msgspec.json.decode(manifest_path(folder).read_bytes(), type=kind)
    except FileNotFoundError:
        return None
    except msgspec.DecodeError as error:
        raise IndexMismatch(f"{manifest_path(folder)}: not a manifest ({error}). {mend}") from None


def readable_manifest(folder: Path, kind: type[M]) -> M | None:
    """None also when it cannot be read: for builders, who replace what is broken."""
    try:
        return read_manifest(folder, kind, "")
    except IndexMismatch:
        return None


def write_manifest(folder: Path, manifest: msgspec.Struct) -> None:
    write_whole(manifest_path(folder), msgspec.json.format(msgspec.json.encode(manifest), indent=2))
