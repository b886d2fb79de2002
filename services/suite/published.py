"""Scores that others published (`published.toml`), to stand beside one's own."""

from __future__ import annotations

import datetime
from collections.abc import Iterable
from pathlib import Path
from statistics import fmean

import msgspec

from services.contract.config import ConfigError

FILE = Path(__file__).with_name("published.toml")


class PublishedRow(msgspec.Struct, frozen=True):
    """Exact match of one published system, as shares."""

    name: str
    exact_match: dict[str, float]
    """By set."""
    source: str
    """Title of what it stands in."""
    url: str
    read: datetime.date

    def average_over(self, sets: list[str]) -> float | None:
        """The mean over these sets, each counting alike; None when it has not all of them."""
        return fmean(self.exact_match[name] for name in sets) if sets and all(name in self.exact_match for name in sets) else None


class _Source(msgspec.Struct):
    title: str
    url: str
    read: datetime.date


class _Row(msgspec.Struct):
    name: str
    source: str
    exact_match: list[float]
    average: float


class Published(msgspec.Struct):
    """The file as it stands."""

    sets: list[str]
    sources: dict[str, _Source]
    rows: list[_Row]


def read_published() -> Published:
    return msgspec.toml.decode(FILE.read_bytes(), type=Published)


def in_order(sets: Iterable[str]) -> list[str]:
    """Search-R1's sets as it prints them, others after them by name."""
    known = read_published().sets
    return sorted(sets, key=lambda name: (known.index(name) if name in known else len(known), name))


def published_rows(wanted: str = "") -> list[PublishedRow]:
    """Those whose name contains every word of `wanted`, in whatever case; "none" gives none. Raises ConfigError where none does."""
    if wanted.strip().lower() == "none":
        return []
    file = read_published()
    words = wanted.lower().split()
    chosen = [row for row in file.rows if all(word in row.name.lower() for word in words)]
    if not chosen:
        raise ConfigError(f"--published {wanted}: no published row has that in its name; there are {_names(file)}")
    return [_named(row, file) for row in chosen]


def _named(row: _Row, file: Published) -> PublishedRow:
    source = file.sources[row.source]
    return PublishedRow(row.name, dict(zip(file.sets, row.exact_match, strict=True)), source.title, source.url, source.read)


def _names(file: Published) -> str:
    return "; ".join(row.name for row in file.rows)
