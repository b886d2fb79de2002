"""A compressed corpus becomes plain JSONL beside itself, once. What a file is, its first bytes tell; its name does not.

The published wiki-18.jsonl.gz is really a tar.gz that holds one JSONL.

| content              | is unpacked to                                              |
|----------------------|-------------------------------------------------------------|
| plain text           | not at all                                                  |
| gzip                 | `<name>.jsonl`                                              |
| gzip of tar, or tar  | `<name>.jsonl`: the one file that the archive holds         |
| zip, xz, bz2, zstd   | refused                                                     |

`<name>.jsonl.source.json` is written last and ties the result to size and time stamp of its source: killed before that,
unpacking starts over. A file of that name that was not unpacked here is never overwritten.
"""

from __future__ import annotations

import gzip
import logging
import os
import tarfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, cast

import msgspec

from services.contract.files import hold_lock, move_into_place
from services.contract.telemetry import Progress
from services.retriever.errors import CorpusError, RetrieverError
from services.retriever.files import need_room, write_whole

log = logging.getLogger("retriever")

GZIP = b"\x1f\x8b"
OTHERS = {b"PK\x03\x04": "zip", b"\xfd7zXZ\x00": "xz", b"BZh": "bzip2", b"\x28\xb5\x2f\xfd": "zstd"}
TAR_MARK, TAR_MARK_AT = b"ustar", 257
SUFFIXES = (".gz", ".tgz", ".tar", ".jsonl", ".json")
CHUNK_BYTES = 4 << 20
SAMPLE_BYTES = 8 << 20
"""Unpacked for an estimate of the whole: gzip itself does not say how large it will be."""


class Source(msgspec.Struct, frozen=True):
    """What an unpacked file came from."""

    source_bytes: int
    source_mtime_ns: int
    unpacked_bytes: int


def unpacked(path: Path) -> Path:
    """`path` itself when it is plain, else its unpacked copy, made if it is not there. Raises CorpusError, RetrieverError."""
    head = _head(path)
    for mark, kind in OTHERS.items():
        if head.startswith(mark):
            raise CorpusError(
                f"{path}: this is {kind}; unpack it and set data.corpus to the JSONL file (gzip and tar.gz need no help)"
            )
    if not head.startswith(GZIP) and not _is_tar(head):
        return path
    target = unpacked_path(path)
    if not _is_whole(path, target):
        _unpack(path, target)
    return target


def unpacked_path(path: Path) -> Path:
    """wiki-18.jsonl.gz and wiki-18.tgz become wiki-18.jsonl; a corpus.jsonl that is gzip becomes corpus.unpacked.jsonl."""
    name = path.name
    while name.endswith(SUFFIXES):
        name = name[: name.rindex(".")]
    plain = path.with_name(f"{name}.jsonl")
    return plain if plain != path else path.with_name(f"{name}.unpacked.jsonl")


def _head(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(512)


def _is_tar(head: bytes) -> bool:
    return head[TAR_MARK_AT : TAR_MARK_AT + len(TAR_MARK)] == TAR_MARK


def _source_path(target: Path) -> Path:
    return target.with_name(target.name + ".source.json")


def _source(path: Path, target: Path) -> Source:
    stamp = path.stat()
    return Source(stamp.st_size, stamp.st_mtime_ns, target.stat().st_size)


def _is_whole(path: Path, target: Path) -> bool:
    try:
        return msgspec.json.decode(_source_path(target).read_bytes(), type=Source) == _source(path, target)
    except (FileNotFoundError, msgspec.DecodeError):
        return False


def _unpack(path: Path, target: Path) -> None:
    try:
        with hold_lock(target.with_name(f".{target.name}.lock"), wait=True):
            if not _is_whole(path, target):  # another service may have unpacked the same corpus meanwhile
                _refuse_strange_file(path, target)
                _write(path, target)
    except (EOFError, gzip.BadGzipFile, zlib.error, tarfile.TarError) as error:
        raise CorpusError(f"{path}: broken or cut short ({error}); download it again") from None
    except OSError as error:
        raise RetrieverError(
            f"{target}: cannot unpack {path.name} here ({error}); free some room, or make the folder writable"
        ) from None


def _refuse_strange_file(path: Path, target: Path) -> None:
    if target.exists() and not _source_path(target).exists():
        raise CorpusError(
            f"{target}: stands where {path.name} would be unpacked to, and was not unpacked from it by us; "
            f"set data.corpus to {target.name} if it is the corpus, else move it away"
        )


def _write(path: Path, target: Path) -> None:
    temporary = target.with_name(target.name + ".tmp")
    _source_path(target).unlink(missing_ok=True)
    try:
        with path.open("rb") as packed, _plain(packed) as (plain, total):
            need_room(target.parent, total, f"unpacking {path.name}")
            _copy(packed, plain, temporary, path.stat().st_size)
        move_into_place(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)
    write_whole(_source_path(target), msgspec.json.encode(_source(path, target)))
    log.info("unpacked %s to %s", path.name, target)


def _copy(packed: BinaryIO, plain: BinaryIO, temporary: Path, packed_bytes: int) -> None:
    with Progress(f"unpacking {Path(packed.name).name}", packed_bytes, "bytes") as bar, temporary.open("wb") as out:
        while chunk := plain.read(CHUNK_BYTES):
            out.write(chunk)
            bar.advance(packed.tell() - bar.done)
        bar.advance(packed_bytes - bar.done)


@contextmanager
def _plain(packed: BinaryIO) -> Iterator[tuple[BinaryIO, int]]:
    """The JSONL within, as a stream, and its size in bytes: exact out of a tar, else estimated from the first bytes."""
    estimate = _estimated_size(packed)
    stream = cast(BinaryIO, gzip.GzipFile(fileobj=packed)) if _starts_with(packed, GZIP) else packed
    inside = stream.read(512)
    stream.seek(0)
    if not _is_tar(inside):
        yield stream, estimate
        return
    with tarfile.open(fileobj=stream, mode="r|") as archive:
        member = _next_file(archive)
        if member is None:
            raise CorpusError(f"{packed.name}: the archive holds no file; data.corpus needs one JSONL in it")
        content = archive.extractfile(member)
        assert content is not None, "a regular file"
        yield cast(BinaryIO, content), member.size
        if (second := _next_file(archive)) is not None:
            raise CorpusError(
                f"{packed.name}: the archive holds {member.name} and {second.name}; unpack it and set data.corpus to one of them"
            )


def _next_file(archive: tarfile.TarFile) -> tarfile.TarInfo | None:
    """Folders and the `._` files of macOS do not count."""
    while (member := archive.next()) is not None:
        if member.isfile() and not Path(member.name).name.startswith("._"):
            return member
    return None


def _starts_with(packed: BinaryIO, mark: bytes) -> bool:
    head = packed.read(len(mark))
    packed.seek(0)
    return head == mark


def _estimated_size(packed: BinaryIO) -> int:
    sample = packed.read(SAMPLE_BYTES)
    rest = os.fstat(packed.fileno()).st_size
    packed.seek(0)
    if not sample.startswith(GZIP):
        return rest
    return round(len(zlib.decompressobj(wbits=31).decompress(sample)) / len(sample) * rest)
