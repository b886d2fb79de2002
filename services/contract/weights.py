"""Policy versions on the shared volume: written whole or not at all, verified before use, deleted when nobody reads them.

A version is a Hugging Face folder ``v000123/`` with a ``manifest.json`` that was written last, after every file was synced;
the folder got its name by one rename. So a folder with that name is whole, and its digests tell whether it still is.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import re
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path

import msgspec

MANIFEST = "manifest.json"
_NAME = re.compile(r"^v\d{6,}$")
_WRITING = ".writing-"
_CHUNK = 8 << 20


class WeightsError(Exception):
    """A version on the volume is torn, altered, or could not be written."""


class NoSpace(WeightsError):
    """The volume is full. Nothing was published and nothing was left behind."""


class FileEntry(msgspec.Struct, frozen=True):
    bytes: int
    sha256: str


class Manifest(msgspec.Struct, frozen=True):
    version: int
    parent: int
    """The version it was trained from; -1 for the first."""
    files: dict[str, FileEntry]


def version_folder(root: Path, version: int) -> Path:
    return root / f"v{version:06d}"


def publish(root: Path, version: int, parent: int, write: Callable[[Path], None], bytes_needed: int = 0) -> Path:
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
        write(temporary)
        _seal(temporary, version, parent)
        temporary.rename(target)
        sync_folder(root)
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise NoSpace(f"{root} filled up while version {version} was written; nothing was published") from error
        raise
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return target


def _seal(folder: Path, version: int, parent: int) -> None:
    """Sync every file, then write the manifest and sync that and the folder."""
    files = {}
    for path in sorted(p for p in folder.iterdir() if p.is_file()):
        sync_file(path)
        files[path.name] = FileEntry(path.stat().st_size, file_digest(path))
    manifest = folder / MANIFEST
    manifest.write_bytes(msgspec.json.format(msgspec.json.encode(Manifest(version, parent, files))))
    sync_file(manifest)
    sync_folder(folder)


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
        if file_digest(path) != expected.sha256:
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


def file_digest(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def sync_file(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def sync_folder(path: Path) -> None:
    """Make a rename or a new name in this folder durable."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
