"""Which policy version is current, and what every engine has of it.

| engine state | meaning                                            | moved on by                                  |
|--------------|----------------------------------------------------|----------------------------------------------|
| loading      | the server is starting                             | its first answered generation                |
| ready        | serves its `version`                               | a newer current version                      |
| paused       | swapping weights                                   | the engine's own report of the new version   |
| stale        | behind `current`; takes no new group               | a successful load                            |

The trainer sets `staged` when a version lies on the volume whole, and `current` when every live engine has verified it (or the
grace ran out). An engine whose heartbeat key expired counts for nothing and holds no version from being deleted.
"""

from __future__ import annotations

from typing import Any, Literal

import msgspec
import redis

from services.contract.store import Keys

EngineState = Literal["loading", "ready", "paused", "stale"]
ALIVE_S = 20
"""An engine that has not reported for so long counts as gone."""


class PolicyVersion(msgspec.Struct, frozen=True):
    version: int
    path: str
    """A Hugging Face folder; every service sees the volume at the path that its own configuration gives."""


class EngineReport(msgspec.Struct, frozen=True):
    engine_id: str
    url: str
    state: EngineState
    version: int
    """What it serves; -1 before the first load."""
    staged: int = -1
    """The newest version whose digests it has verified."""
    reading: list[int] = []
    """Versions whose files it may still open."""
    tensor_parallel: int = 1
    worker: str = ""


class PolicyBoard:
    """The `policy` hash and the `engines` registry. Safe to use from many processes."""

    def __init__(self, client: redis.Redis, run: str) -> None:
        self.client: Any = client  # redis-py types every answer as sync or async
        self.keys = Keys(run)

    def stage(self, version: PolicyVersion) -> None:
        self.client.hset(self.keys.policy, "staged", msgspec.json.encode(version))

    def commit(self, version: PolicyVersion) -> None:
        """Make `version` current: engines load it and take no new group until they have."""
        body = msgspec.json.encode(version)
        self.client.hset(self.keys.policy, mapping={"staged": body, "current": body})

    def current(self) -> PolicyVersion | None:
        return self._get("current")

    def staged(self) -> PolicyVersion | None:
        return self._get("staged")

    def report(self, report: EngineReport) -> None:
        """An engine's own word on itself; also its sign of life."""
        with self.client.pipeline() as pipe:
            pipe.hset(self.keys.engines, report.engine_id, msgspec.json.encode(report))
            pipe.set(self.keys.engine_alive(report.engine_id), 1, ex=ALIVE_S)
            pipe.execute()

    def remove(self, engine_id: str) -> None:
        self.client.hdel(self.keys.engines, engine_id)
        self.client.delete(self.keys.engine_alive(engine_id))

    def live_engines(self) -> list[EngineReport]:
        """Reports of the engines that are alive; those long gone are taken off the registry."""
        reports = [msgspec.json.decode(body, type=EngineReport) for body in self.client.hvals(self.keys.engines)]
        alive = [bool(self.client.exists(self.keys.engine_alive(report.engine_id))) for report in reports]
        for report, lives in zip(reports, alive, strict=True):
            if not lives:
                self.client.hdel(self.keys.engines, report.engine_id)
        return [report for report, lives in zip(reports, alive, strict=True) if lives]

    def _get(self, field: str) -> PolicyVersion | None:
        body = self.client.hget(self.keys.policy, field)
        return msgspec.json.decode(body, type=PolicyVersion) if body else None
