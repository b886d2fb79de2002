"""Files that are either whole or absent: written under a temporary name, synced, renamed."""

from __future__ import annotations

import fcntl
import hashlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from services.retriever.errors import RetrieverError

CHUNK_BYTES = 4 << 20


def sha256(path: Path, on_bytes: Callable[[int], None] | None = None) -> str:
    """Hex digest of a file; `on_bytes` hears how many bytes were just read."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
            if on_bytes:
                on_bytes(len(chunk))
    return digest.hexdigest()


def sync(path: Path) -> None:
    """Flush a file or a folder to disk: a rename is durable only once its folder is synced."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def publish(temporary: Path, final: Path) -> None:
    """Give a finished file its real name."""
    sync(temporary)
    temporary.replace(final)
    sync(final.parent)


def write_whole(path: Path, content: bytes) -> None:
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_bytes(content)
    publish(temporary, path)


@contextmanager
def sole_writer(folder: Path) -> Iterator[None]:
    """Only one process builds in `folder`. The lock goes with the process, however it ends."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RetrieverError(f"{folder}: another process is building this index; wait for it or stop it") from None
        yield
