"""The corpus: JSONL with `id` and `contents`, one passage a line, opened by memory map; `unpack` unpacks a compressed one.

Row number is identity: row i of the corpus is vector i of the index. A row is parsed only when it is asked for, and
served as the bytes of its line, so that extra columns pass through untouched.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from services.retriever.errors import CorpusError
from services.retriever.offsets import line_offsets
from services.retriever.unpack import unpacked

FIRST_ROWS = 100
"""Rows checked whenever a corpus is opened; all of them are checked when an index is built."""
CANARY_CHARS = 200


class _Passage(msgspec.Struct):
    id: str | int
    contents: str


_decode_passage = msgspec.json.Decoder(_Passage).decode
_decode_row = msgspec.json.Decoder(dict[str, Any]).decode


class Corpus:
    """`len(corpus)` passages; `corpus[i]` is row i as a dict, `corpus.line(i)` its JSON text."""

    def __init__(self, path: Path, data: mmap.mmap, offsets: np.ndarray) -> None:
        self.path = path
        self._data = data
        self._offsets = offsets
        """uint64 [rows + 1]: line i is bytes [offsets[i], offsets[i + 1])."""

    @classmethod
    def open(cls, path: Path) -> Corpus:
        """Raises CorpusError when the file is missing, empty, or one of its first rows is not a passage.

        A compressed corpus is unpacked beside itself first; `corpus.path` is then the unpacked file.
        """
        if not path.is_file():
            raise CorpusError(f"{path}: no corpus here; run `prepare`, or set data.corpus to a JSONL file")
        path = unpacked(path)
        if path.stat().st_size == 0:
            raise CorpusError(f"{path}: the corpus is empty; write at least one passage into it")
        with path.open("rb") as file:
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        corpus = cls(path, data, line_offsets(path))
        corpus.check_rows(stop=FIRST_ROWS)
        return corpus

    def __len__(self) -> int:
        return len(self._offsets) - 1

    def __getitem__(self, row: int) -> dict[str, Any]:
        return _decode_row(self.line(row))

    def line(self, row: int) -> bytes:
        """The JSON text of one passage. A negative row is an IndexError: FAISS writes -1 for "nothing found"."""
        if not 0 <= row < len(self):
            raise IndexError(f"row {row} of a corpus of {len(self)} passages")
        return self._data[int(self._offsets[row]) : int(self._offsets[row + 1])].strip()

    def contents(self, row: int) -> str:
        """Title line and text. Raises CorpusError with file and line when the row is no passage."""
        try:
            return _decode_passage(self.line(row)).contents
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            mend = 'each line must be one JSON object with "id" and a text "contents"'
            raise CorpusError(f"{self.path}:{row + 1}: {error}; {mend}") from None

    def canary(self) -> str:
        """A query that must find something: the start of the first passage."""
        return self.contents(0)[:CANARY_CHARS].strip() or "canary"

    def lengths(self, start: int = 0, stop: int | None = None) -> np.ndarray:
        """uint64 [stop - start]: bytes of each of these lines, a stand-in for its tokens."""
        end = len(self) if stop is None else stop
        return np.diff(self._offsets[start : end + 1])

    def check_rows(self, stop: int | None = None, on_row: Callable[[], None] | None = None) -> None:
        """Parse the rows before `stop` (None: all), so that a broken one is found before hours of encoding."""
        for row in range(min(len(self), stop or len(self))):
            self.contents(row)
            if on_row:
                on_row()
