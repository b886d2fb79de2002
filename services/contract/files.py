"""Files and folders that a crash leaves whole: hashed, flushed to the disk, renamed into place, held by one process.

A name that was given by `move_into_place` stands for all of the new content or all of the old, whatever was cut off when.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import IO, Protocol

CHUNK_BYTES = 4 << 20


class Digest(Protocol):
    """What hashlib's and blake3's objects have in common."""

    def update(self, data: bytes | memoryview, /) -> object: ...

    def hexdigest(self) -> str: ...


def file_digest(path: Path, on_bytes: Callable[[int], object] | None = None, kind: Callable[[], Digest] = hashlib.sha256) -> str:
    """Digest of a file, in hex; `on_bytes` hears how many bytes were just read."""
    digest = kind()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
            if on_bytes:
                on_bytes(len(chunk))
    return digest.hexdigest()


def sync(path: Path) -> None:
    """Flush a file, or the names in a folder, to the disk. A rename is durable only once its folder is synced."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def move_into_place(temporary: Path, final: Path) -> None:
    """Give a finished file its name, in place of what had it; or a folder, whose files are synced, where there is none."""
    sync(temporary)
    temporary.replace(final)
    sync(final.parent)


def replace_file(path: Path, content: bytes) -> None:
    """The whole content or what was there before. Raises OSError, and leaves no temporary file then."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        temporary.write_bytes(content)
        move_into_place(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def hold_lock(path: Path, wait: bool = False) -> IO[str]:
    """A lock that is held until the file that comes back is closed, or the process ends, however it ends.

    With `wait` whoever has it is waited for; else BlockingIOError says that it is taken. The folder must be there.
    """
    file = path.open("w")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BaseException:
        file.close()
        raise
    return file
