"""What every backend answers with: a passage as the JSON text it is served as, and its score."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import msgspec


class Passage(NamedTuple):
    document: bytes
    """A JSON object with at least `contents` ("title", newline, text); from a corpus it is the row's own line."""
    score: float
    """Higher is better; comparable only among the passages of one backend."""


class _Contents(msgspec.Struct):
    contents: str


_decode = msgspec.json.Decoder(_Contents).decode


def contents(passage: Passage) -> str:
    return _decode(passage.document).contents


def render(found: Sequence[Sequence[Passage]], return_scores: bool) -> bytes:
    """The body of an answer: Search-R1's items with scores, slime's bare documents without."""

    def item(passage: Passage) -> object:
        document = msgspec.Raw(passage.document)
        return {"document": document, "score": passage.score} if return_scores else document

    return msgspec.json.encode({"result": [[item(passage) for passage in passages] for passages in found]})
