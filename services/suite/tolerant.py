"""Reads records one by one, so that one that this version cannot read does not blind the whole view."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import msgspec

T = TypeVar("T")


class Tolerant:
    def __init__(self) -> None:
        self.unreadable = 0
        """Records passed over so far."""

    def read(self, decode: Callable[[bytes], T], body: bytes) -> T | None:
        try:
            return decode(body)
        except (msgspec.DecodeError, ValueError):
            self.unreadable += 1
            return None
