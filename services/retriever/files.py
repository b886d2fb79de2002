"""Files that are either whole or absent: written under a temporary name, synced, renamed."""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
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


def need_room(folder: Path, size: int, what: str) -> None:
    """Raises RetrieverError when `size` more bytes do not fit beside what `folder` holds: better now than hours later."""
    free = shutil.disk_usage(folder).free
    if size > free:
        raise RetrieverError(
            f"{folder}: {what} needs {size:,} bytes, {free:,} are free here; free some or move data.directory to a larger disk"
        )


@contextmanager
def written_whole(final: Path) -> Iterator[Path]:
    """A temporary name to write to, published at the end; whatever fails leaves neither file behind.

    FAISS tells a full disk as a RuntimeError, the system as an OSError: both become a RetrieverError with the mend.
    """
    temporary = final.with_name(final.name + ".tmp")
    try:
        yield temporary
        publish(temporary, final)
    except (OSError, RuntimeError) as error:
        free = shutil.disk_usage(final.parent).free
        raise RetrieverError(
            f"{final}: cannot be written ({error}); {free:,} bytes are free there: free some or move data.directory"
        ) from error
    finally:
        temporary.unlink(missing_ok=True)


def write_whole(path: Path, content: bytes) -> None:
    with written_whole(path) as temporary:
        temporary.write_bytes(content)


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
