"""Finds episodes by id: those in Redis, then those in the trainer's transcripts, the newest file first.

An id may be in both (a group whose checkpoint is not durable yet) or in several files (a group that was trained again after a
crash): Redis wins, then the newest file.
"""

from __future__ import annotations

import difflib
import heapq
import os
import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import msgspec

from services.contract.config import Config
from services.contract.messages import GradedNotice, Trajectory, read_trajectory
from services.contract.store import Keys
from services.suite.episodes import Episode, TranscriptRow, from_trajectory, from_transcript
from services.suite.redis_address import hasty_client
from services.suite.tolerant import Tolerant

IDS_IN_A_MESSAGE = 8
COMPARED = 2000
"""Ids that a wrong one is compared with in earnest; of more, only those that begin most alike."""
NOTICES = 2000
_ID = re.compile(rb'^\{"id": "((?:[^"\\]|\\.)*)"')


class NotFound(Exception):
    """No episode, or more than one, begins so. The message names what is near."""


class RedisShelf:
    """Trajectories that are still in Redis."""

    def __init__(self, config: Config) -> None:
        self.client: Any = hasty_client(config)  # redis-py types every answer as sync or async
        self.keys = Keys(config.run.name)
        self.place = f"Redis at {config.redis.url}"

    def ids(self, beginning: str = "") -> list[str]:
        pattern = self.keys.trajectory(_literally(beginning)) + "*"
        start = len(self.keys.trajectory(""))
        return [key.decode(errors="replace")[start:] for key in self.client.scan_iter(pattern, count=1000)]

    def load(self, trajectory_id: str) -> Trajectory | None:
        """Raises NotFound when it cannot be read."""
        body, reward = self.client.mget(self.keys.trajectory(trajectory_id), self.keys.reward(trajectory_id))
        try:
            return read_trajectory(body, reward) if body else None
        except (msgspec.DecodeError, ValueError) as error:
            raise NotFound(f"{trajectory_id} is in {self.place}, but this version of forage cannot read it: {error}") from None

    def latest(self, count: int) -> list[Episode]:
        """Those not graded yet, then the graded ones, the latest first."""
        records, decode = Tolerant(), msgspec.msgpack.Decoder(GradedNotice).decode
        entries = self.client.xrevrange(self.keys.graded, count=NOTICES)
        notices = [records.read(decode, fields.get(b"body", b"")) for _, fields in entries]
        graded = [notice.trajectory_id for notice in notices if notice]
        stored = set(self.ids())
        order = [*sorted(stored - set(graded)), *(i for i in graded if i in stored)][:count]
        names = [name(i) for i in order for name in (self.keys.trajectory, self.keys.reward)]
        bodies = self.client.mget(names) if names else []
        pairs = zip(bodies[::2], bodies[1::2], strict=True)
        found = [records.read(partial(read_trajectory, reward=reward), body) for body, reward in pairs if body]
        return [from_trajectory(trajectory, self.place) for trajectory in found if trajectory]


class Transcripts:
    """What the trainer wrote of the groups that it trained on or evaluated with."""

    def __init__(self, config: Config) -> None:
        self.folder = config.run.folder

    def files(self) -> list[Path]:
        """The newest first."""
        found = [path for name in ("transcripts", "evaluations") for path in (self.folder / name).glob("*.jsonl")]
        return sorted(found, key=_modified, reverse=True)

    def ids(self, beginning: str = "") -> list[str]:
        """Each once, of the newest file first."""
        return list(dict.fromkeys(name for path in self.files() for name, _ in _lines(path) if name.startswith(beginning)))

    def load(self, trajectory_id: str) -> Episode | None:
        for path in self.files():
            for name, line in _lines(path):
                if name == trajectory_id and (row := _row(line)):
                    return from_transcript(row, str(path))
        return None

    def latest(self, count: int) -> Iterator[Episode]:
        """Backwards from the last line of the newest file."""
        for path in self.files():
            for _, line in reversed(list(_lines(path))):
                if count <= 0:
                    return
                if row := _row(line):
                    count -= 1
                    yield from_transcript(row, str(path))


def resolve(wanted: str, ids: list[str]) -> str:
    """The id itself, or the only one that begins so. Raises NotFound."""
    if wanted in ids:
        return wanted
    beginning = sorted(i for i in set(ids) if i.startswith(wanted))
    if len(beginning) == 1:
        return beginning[0]
    if beginning:
        raise NotFound(f"{wanted} is the beginning of {len(beginning)} trajectories: {_named(beginning)}")
    close = near(wanted, ids)
    known = f"near it: {_named(close)}" if close else "`forage trajectory` lists the latest"
    raise NotFound(f"no trajectory {wanted} in Redis or in the trainer's transcripts; {known}")


def near(wanted: str, ids: list[str]) -> list[str]:
    """The ids most like it, best first."""
    if len(ids) > COMPARED:
        ids = heapq.nlargest(COMPARED, ids, key=lambda i: len(os.path.commonprefix([wanted, i])))
    return difflib.get_close_matches(wanted, ids, n=5, cutoff=0.6)


def _named(ids: list[str]) -> str:
    more = f" and {len(ids) - IDS_IN_A_MESSAGE} more" if len(ids) > IDS_IN_A_MESSAGE else ""
    return ", ".join(ids[:IDS_IN_A_MESSAGE]) + more


def _literally(text: str) -> str:
    """For a Redis pattern, in which some characters stand for others."""
    return re.sub(r"([\\*?\[\]^])", r"\\\1", text)


def _lines(path: Path) -> Iterator[tuple[str, bytes]]:
    """(id, line) of every line that begins as a transcript does; the rest of the line is not looked at."""
    try:
        with path.open("rb") as file:
            for line in file:
                if match := _ID.match(line):
                    yield match[1].decode(errors="replace"), line
    except OSError:
        return  # removed at this instant, or another user's


def _row(line: bytes) -> TranscriptRow | None:
    """None of a line that is being written at this instant, or is damaged."""
    try:
        return msgspec.json.decode(line, type=TranscriptRow)
    except msgspec.DecodeError:
        return None


def _modified(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0
