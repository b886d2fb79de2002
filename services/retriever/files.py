"""What the retriever writes is whole or absent; when it cannot be written, a RetrieverError says where and what to mend."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from services.contract.files import hold_lock, move_into_place
from services.retriever.errors import RetrieverError


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
        move_into_place(temporary, final)
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


def sole_writer(folder: Path) -> IO[str]:
    """Only one process builds in `folder` until this is closed. Raises RetrieverError when another one does."""
    folder.mkdir(parents=True, exist_ok=True)
    try:
        return hold_lock(folder / ".lock")
    except BlockingIOError:
        raise RetrieverError(f"{folder}: another process is building this index; wait for it or stop it") from None
