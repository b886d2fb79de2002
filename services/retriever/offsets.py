"""Where each line of a corpus starts: found once, kept in `<corpus>.offsets.npy`, mapped from then on.

| uint64 in the file      | is                                                                |
|-------------------------|-------------------------------------------------------------------|
| 0 … rows - 1            | the byte at which line i starts                                   |
| rows                    | the size of the corpus in bytes, where the last line ends         |
| rows + 1                | the corpus's time stamp in nanoseconds                            |

So the file says by itself which corpus it belongs to: with another size or time stamp it is made anew. Where the folder
cannot be written to (a read-only volume), the offsets stay in memory, 8 bytes a line.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import nullcontext
from itertools import chain
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.lib import format as npy

from services.contract.files import move_into_place
from services.contract.telemetry import Progress
from services.retriever.errors import CorpusError

SCAN_BYTES = 16 << 20
QUIET_BYTES = 256 << 20
"""A smaller corpus is read before a progress bar would say anything."""
NEWLINE = ord("\n")


def offsets_path(corpus: Path) -> Path:
    return corpus.with_name(corpus.name + ".offsets.npy")


def line_offsets(corpus: Path) -> np.ndarray:
    """uint64 [rows + 1]: line i is bytes [offsets[i], offsets[i + 1]). Raises CorpusError at an empty line."""
    kept = _read(corpus)
    if kept is not None:
        return kept
    try:
        _write(corpus)
    except OSError:  # a read-only folder, or a full disk: the corpus can be served all the same
        return np.concatenate(list(_scan(corpus)))
    return _read_new(corpus)


def _read(corpus: Path) -> np.ndarray | None:
    """The offsets file, mapped; None when there is none or it belongs to another corpus."""
    try:
        stored = np.load(offsets_path(corpus), mmap_mode="r")
    except (OSError, ValueError, EOFError):  # missing, or truncated
        return None
    stamp = corpus.stat()
    if stored.dtype != np.uint64 or stored.ndim != 1 or len(stored) < 3 or tuple(stored[-2:]) != (stamp.st_size, stamp.st_mtime_ns):
        return None
    return stored[:-1]


def _read_new(corpus: Path) -> np.ndarray:
    if (offsets := _read(corpus)) is None:
        raise CorpusError(f"{corpus}: the corpus changed while it was opened; start again when nothing writes it")
    return offsets


def _write(corpus: Path) -> None:
    """In chunks, so that memory does not grow with the corpus; the header, which holds the length, is written last."""
    final, stamp = offsets_path(corpus), corpus.stat()
    temporary = final.with_name(f"{final.name}.{os.getpid()}-{threading.get_ident()}")  # two services may open one corpus
    try:
        with temporary.open("wb") as file:
            count = 0
            _write_header(file, count)
            for starts in chain(_scan(corpus), [np.array([stamp.st_mtime_ns], np.uint64)]):
                file.write(starts.tobytes())
                count += len(starts)
            file.seek(0)
            _write_header(file, count)
        move_into_place(temporary, final)
    finally:
        temporary.unlink(missing_ok=True)


def _write_header(file: BinaryIO, count: int) -> None:
    """numpy leaves room in it for a longer first axis, so that it can be written again in place."""
    npy.write_array_header_1_0(file, {"descr": "<u8", "fortran_order": False, "shape": (count,)})


def _scan(corpus: Path) -> Iterator[np.ndarray]:
    """uint64 line starts a chunk at a time, then the end. Read, not mapped: mapped pages would count as this process's memory."""
    size, buffer = corpus.stat().st_size, bytearray(SCAN_BYTES)
    view, line, last = np.frombuffer(buffer, np.uint8), 1, 0
    yield np.zeros(1, np.uint64)
    begin, bar = 0, Progress("finding the lines of the corpus", size, "bytes")
    with bar if size >= QUIET_BYTES else nullcontext(), corpus.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            starts = np.flatnonzero(view[:count] == NEWLINE).astype(np.uint64) + np.uint64(begin + 1)
            _refuse_empty_line(corpus, starts, last, line)
            yield starts
            begin += count
            bar.advance(count)
            if len(starts):
                line, last = line + len(starts), int(starts[-1])
    if last != size:
        yield np.array([size], np.uint64)


def _refuse_empty_line(corpus: Path, starts: np.ndarray, last: int, line: int) -> None:
    """`last` is where line number `line` starts, `starts` where those after it do."""
    empty = np.flatnonzero(np.diff(starts, prepend=np.uint64(last)) == 1)
    if len(empty):
        raise CorpusError(f"{corpus}:{line + empty[0]}: empty line; remove it, every line is a passage")
