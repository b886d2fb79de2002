"""How fast trajectories come out, from the notices of the last minute in the `graded` stream.

The trainer deletes notices and bodies when it releases a group, so a meter that goes on looking remembers what it has seen;
a single look counts only what is still there.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import msgspec

from services.contract.messages import GradedNotice, decode_trajectory
from services.contract.store import Keys
from services.suite.tolerant import Tolerant

WINDOW_S = 60.0
NOTICES, BODIES = 2000, 64
"""Read in one look at most. Where there are more bodies, those read stand for the others."""


class Speed(msgspec.Struct, frozen=True):
    """Of the last minute."""

    trajectories: int
    tokens_per_s: float
    """Tokens that the policy wrote; what it was shown does not count."""
    by_worker: dict[str, float]
    """The same for each worker."""


class Finished(msgspec.Struct, frozen=True):
    time: float
    tokens: int | None
    """None: its body was not read."""
    worker: str


class Speedometer:
    def __init__(self, client: Any, keys: Keys) -> None:
        self.client, self.keys = client, keys
        self._seen: dict[bytes, Finished] = {}

    def look(self, now: float, records: Tolerant) -> Speed:
        """`now` is Redis's time in seconds."""
        since = now - WINDOW_S
        self._seen = {entry_id: finished for entry_id, finished in self._seen.items() if finished.time >= since}
        entries = self.client.xrevrange(self.keys.graded, min=int(since * 1000), count=NOTICES)
        fresh = [(entry_id, fields.get(b"body", b"")) for entry_id, fields in entries if entry_id not in self._seen]
        self._seen |= {entry_id: Finished(_time(entry_id), None, "") for entry_id, _ in fresh}
        self._read_bodies(fresh[:BODIES], records)
        return speed(list(self._seen.values()))

    def _read_bodies(self, entries: list[tuple[bytes, bytes]], records: Tolerant) -> None:
        decode = msgspec.msgpack.Decoder(GradedNotice).decode
        notices = {entry_id: notice for entry_id, body in entries if (notice := records.read(decode, body))}
        bodies = self.client.mget([self.keys.trajectory(n.trajectory_id) for n in notices.values()]) if notices else []
        for entry_id, body in zip(notices, bodies, strict=True):
            if trajectory := body and records.read(decode_trajectory, body):
                self._seen[entry_id] = Finished(_time(entry_id), sum(trajectory.loss_mask), trajectory.worker)


def speed(finished: list[Finished]) -> Speed:
    """Trajectories without a known length count with the mean of the others, and are shared out as the others are."""
    known = [f for f in finished if f.tokens is not None]
    scale = len(finished) / len(known) / WINDOW_S if known else 0.0
    tokens: dict[str, float] = defaultdict(float)
    for f in known:
        tokens[f.worker] += (f.tokens or 0) * scale
    return Speed(len(finished), sum(tokens.values()), dict(tokens))


def _time(entry_id: bytes) -> float:
    return int(entry_id.partition(b"-")[0]) / 1000
