"""Policy versions on the shared volume: written whole or not at all, verified before use, deleted when nobody reads them.

A version is a Hugging Face folder ``v000123/`` with a ``manifest.json`` that was written last, after every file was synced;
the folder got its name by one rename. So a folder with that name is whole, and its digests tell whether it still is.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import re
import shutil
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType

import msgspec
from blake3 import blake3

from services.contract.files import file_digest, move_into_place, sync

MANIFEST = "manifest.json"
_NAME = re.compile(r"^v\d{6,}$")
_WRITING = ".writing-"
_CHUNK = 8 << 20
_SYNC_FILE_RANGE_WRITE = 2
_libc = ctypes.CDLL(None)


class WeightsError(Exception):
    """A version on the volume is torn, altered, or could not be written."""


class NoSpace(WeightsError):
    """The volume is full. Nothing was published and nothing was left behind."""


class FileEntry(msgspec.Struct, frozen=True):
    bytes: int
    blake3: str = ""
    """In hex. Of the digests that a forger cannot meet it is the one that keeps up with a fast disk."""
    sha256: str = ""
    """Instead of it, in manifests that were written before."""

    def differs(self, path: Path) -> bool:
        """Whether the file's digest is not this one; without any it is."""
        if self.blake3:
            return file_digest(path, kind=blake3) != self.blake3
        return file_digest(path) != self.sha256


class Manifest(msgspec.Struct, frozen=True):
    version: int
    parent: int
    """The version it was trained from; -1 for the first."""
    files: dict[str, FileEntry]


Write = Callable[[Path], Mapping[str, FileEntry] | None]
"""Fills a folder. Returns what it knows of the files that are synced already (`HashedFile`); the others are read and synced."""


def version_folder(root: Path, version: int) -> Path:
    return root / f"v{version:06d}"


def is_published(root: Path, version: int) -> bool:
    return (version_folder(root, version) / MANIFEST).exists()


def publish(root: Path, version: int, parent: int, write: Write, bytes_needed: int = 0) -> Path:
    """Let `write` fill a folder, then make it version `version` in one step. Returns its final path.

    Raises NoSpace when the volume has less than `bytes_needed` free or fills up on the way, WeightsError if the version exists.
    """
    target = version_folder(root, version)
    if target.exists():
        raise WeightsError(f"{target} exists already: versions are immutable; publish under a higher number")
    root.mkdir(parents=True, exist_ok=True)
    if (free := shutil.disk_usage(root).free) < bytes_needed:
        raise NoSpace(f"{root} has {free / 1e9:.2f} GB free, version {version} needs {bytes_needed / 1e9:.2f} GB: free some space")
    temporary = root / f"{_WRITING}{target.name}"
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir()
        _seal(temporary, version, parent, write(temporary) or {})
        move_into_place(temporary, target)
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise NoSpace(f"{root} filled up while version {version} was written; nothing was published") from error
        raise
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return target


def _seal(folder: Path, version: int, parent: int, written: Mapping[str, FileEntry]) -> None:
    """Sync every file that is not yet, then write the manifest."""
    files = dict(written)
    for path in sorted(p for p in folder.iterdir() if p.is_file() and p.name not in written):
        sync(path)
        files[path.name] = FileEntry(path.stat().st_size, file_digest(path, kind=blake3))
    manifest = folder / MANIFEST
    manifest.write_bytes(msgspec.json.format(msgspec.json.encode(Manifest(version, parent, files))))
    sync(manifest)


def read_manifest(folder: Path) -> Manifest:
    """Raises WeightsError when there is none or it cannot be read."""
    try:
        return msgspec.json.decode((folder / MANIFEST).read_bytes(), type=Manifest)
    except FileNotFoundError:
        raise WeightsError(f"{folder} has no {MANIFEST}: it was never published whole, or has been deleted") from None
    except msgspec.DecodeError as error:
        raise WeightsError(f"{folder / MANIFEST} cannot be read: {error}") from None


def verify(folder: Path) -> Manifest:
    """Check the size and digest of every file against the manifest. Raises WeightsError naming the first that differs."""
    manifest = read_manifest(folder)
    for name, expected in manifest.files.items():
        path = folder / name
        if not path.exists():
            raise WeightsError(f"{path} is missing from version {manifest.version}")
        if (size := path.stat().st_size) != expected.bytes:
            raise WeightsError(f"{path} has {size} bytes, the manifest says {expected.bytes}")
        if expected.differs(path):
            raise WeightsError(f"{path} does not have the digest of the manifest: the file was altered or torn")
    return manifest


def published_versions(root: Path) -> list[int]:
    """Every whole version on the volume, lowest first. A folder without a manifest is half a deletion, not a version."""
    return sorted(int(path.name[1:]) for path in _folders(root) if _NAME.match(path.name) and (path / MANIFEST).exists())


def _folders(root: Path) -> list[Path]:
    return [path for path in root.iterdir() if path.is_dir()] if root.exists() else []


def collect_garbage(root: Path, keep_last: int, in_use: Iterable[int]) -> list[int]:
    """Delete all but the last `keep_last` versions and those `in_use`; and whatever a killed writer or deleter left.

    Returns the versions deleted. Only the writer may call it, and not while it publishes.
    """
    versions = published_versions(root)
    protected = set(versions[-keep_last:]) | set(in_use)
    doomed = [version for version in versions if version not in protected]
    for version in doomed:
        folder = version_folder(root, version)
        with contextlib.suppress(FileNotFoundError):  # the manifest goes first: half a deletion must not look whole
            (folder / MANIFEST).unlink()
        shutil.rmtree(folder, ignore_errors=True)
    for folder in _folders(root):
        if folder.name.startswith(_WRITING) or (_NAME.match(folder.name) and not (folder / MANIFEST).exists()):
            shutil.rmtree(folder, ignore_errors=True)
    return doomed


class HashedFile:
    """A file that is written and hashed in one pass, and synced once, at the end; `entry` is its line of the manifest.

    Hashing goes on in a thread beside the write, and each chunk is on its way to the disk while the next one is written.
    """

    def __init__(self, path: Path) -> None:
        self._path, self._digest, self._bytes = path, blake3(), 0
        self._hashing: Future[blake3] | None = None
        self.entry = FileEntry(0)

    def __enter__(self) -> HashedFile:
        self._file = self._path.open("xb", buffering=0)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="digest")
        return self

    def write(self, data: bytes | memoryview) -> None:
        """`data` must stay as it is until the next call."""
        view = memoryview(data).cast("B")
        for start in range(0, len(view), _CHUNK):
            self._write_chunk(view[start : start + _CHUNK])

    def _write_chunk(self, chunk: memoryview) -> None:
        former, self._hashing = self._hashing, self._thread.submit(self._digest.update, chunk)
        written = 0
        while written < len(chunk):
            written += self._file.write(chunk[written:]) or 0
        _start_writeback(self._file.fileno(), self._bytes, len(chunk))
        self._bytes += len(chunk)
        if former:
            former.result()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._thread.shutdown(wait=True)
        try:
            if error is None:
                if self._hashing:
                    self._hashing.result()
                os.fsync(self._file.fileno())
                self.entry = FileEntry(self._bytes, self._digest.hexdigest())
        finally:
            self._file.close()


def _start_writeback(file: int, start: int, size: int) -> None:
    """Ask Linux to begin writing a range to the disk, without waiting; elsewhere the sync at the end does all of it."""
    if sync_file_range := getattr(_libc, "sync_file_range", None):
        sync_file_range(file, ctypes.c_int64(start), ctypes.c_int64(size), _SYNC_FILE_RANGE_WRITE)
