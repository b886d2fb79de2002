"""Checks every row of the files that the user brings. An error names file, line and the mend.

Duplicates are looked for among questions, not in the corpus: a set of twenty million ids does not fit a small machine.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import msgspec

from services.contract.messages import Demonstration, Question
from services.prepare.errors import PrepareError


class CorpusRow(msgspec.Struct, frozen=True):
    id: str | int
    contents: str


Row = TypeVar("Row", CorpusRow, Question, Demonstration)
SHAPES = {
    CorpusRow: '{"id": "1", "contents": "\\"Title\\"\\nText"}',
    Question: '{"id": "1", "source": "kind", "question": "...?", "golden_answers": ["..."]}',
    Demonstration: '{"example_id": "kind:1", "question": "...?", "segments": [{"kind": "model", "text": "..."}]}',
}


def is_packed(path: Path) -> bool:
    """Whether the retriever will unpack this corpus: gzip or tar, told by content."""
    with path.open("rb") as file:
        head = file.read(262)
    return head.startswith(b"\x1f\x8b") or head[257:262] == b"ustar"


def check_corpus(path: Path, key: str) -> int:
    """The number of passages."""

    def check(row: CorpusRow) -> str | None:
        return None if row.contents.strip() else "`contents` is empty; write a title, a newline and the text"

    return _count(_checked(path, key, CorpusRow, check), path, key)


def check_questions(path: Path, key: str) -> int:
    """The number of questions."""
    seen: set[str] = set()

    def check(row: Question) -> str | None:
        if not row.question.strip():
            return "`question` is empty"
        if not row.golden_answers or not all(answer.strip() for answer in row.golden_answers):
            return "`golden_answers` needs at least one answer, and none may be empty"
        if row.example_id in seen:
            return f"`{row.example_id}` (source:id) stands there twice; give each question of a source its own id"
        seen.add(row.example_id)
        return None

    return _count(_checked(path, key, Question, check), path, key)


def check_demonstrations(path: Path, key: str) -> int:
    """The number of demonstrations."""

    def check(row: Demonstration) -> str | None:
        if not row.segments or row.segments[0].kind != "model" or row.segments[-1].kind != "model":
            return "`segments` must begin and end with what the model writes (kind `model`)"
        return None if "</answer>" in row.segments[-1].text else "the last segment holds no <answer>...</answer>"

    return _count(_checked(path, key, Demonstration, check), path, key)


def _count(rows: Iterator[object], path: Path, key: str) -> int:
    count = sum(1 for _ in rows)
    if not count:
        raise PrepareError(f"{key}: {path} is empty; write at least one row into it")
    return count


def _checked(path: Path, key: str, shape: type[Row], check: Callable[[Row], str | None]) -> Iterator[Row]:
    if not path.is_file():
        raise PrepareError(f"{key}: no file at {path}; put it there, or set {key} to its path")
    decode = msgspec.json.Decoder(shape).decode
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                row = decode(line)
            except (msgspec.DecodeError, UnicodeDecodeError) as error:
                mend = f"each line must be one JSON object such as {SHAPES[shape]}"
                raise PrepareError(f"{path}:{number}: {error}; {mend}") from None
            if problem := check(row):
                raise PrepareError(f"{path}:{number}: {problem}")
            yield row
