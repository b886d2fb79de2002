"""Which policy version is current, and what every engine has of it.

| engine state | meaning                                            | moved on by                                  |
|--------------|----------------------------------------------------|----------------------------------------------|
| loading      | the server is starting                             | its first answered generation                |
| ready        | serves its `version`                               | a newer current version                      |
| paused       | swapping weights                                   | the engine's own report of the new version   |
| stale        | behind `current`; takes no new group               | a successful load                            |

The trainer sets `staged` when a version lies on the volume whole, and `current` when every live engine has verified it (or the
grace ran out). An engine whose heartbeat key expired counts for nothing and holds no version from being deleted.

An engine that several workers are attached to is updated by one of them at a time, the one that holds it:

| hold              | note of a pause | what it means                                 | moved on by                             |
|-------------------|-----------------|-----------------------------------------------|-----------------------------------------|
| free              | none            | the engine serves                             | a worker holds it, to update it         |
| held, renewed     | none            | it is about to be updated, and serves         | the holder: notes the pause             |
| held, renewed     | there           | it may be paused                              | the holder: resumes, takes the note off |
| expired           | none            | the holder died before it paused              | the next holder updates                 |
| expired or let go | there           | the holder died in a pause, or a load failed  | the next holder pauses, loads, resumes  |

So a pause ends with the life of its worker: another one that is attached, or the same one when it is back, ends it.
"""

from __future__ import annotations

from typing import Any, Literal

import msgspec
import redis

from services.contract.push import PushBoard
from services.contract.store import Keys

EngineState = Literal["loading", "ready", "paused", "stale"]
ALIVE_S = 20
"""An engine that has not reported for so long counts as gone."""
_HOLD = """
local holder = redis.call('GET', KEYS[1])
if holder and holder ~= ARGV[1] then return 0 end
redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[2])
return 1
"""
_LET_GO = "if redis.call('GET', KEYS[1]) == ARGV[1] then redis.call('DEL', KEYS[1]) end"


class PolicyVersion(msgspec.Struct, frozen=True):
    version: int
    path: str
    """A Hugging Face folder; every service sees the volume at the path that its own configuration gives."""
    pushed: bool = False
    """It went straight into the engines (`push.py`); the folder is written later, or when an engine needs it."""


class EngineReport(msgspec.Struct, frozen=True):
    engine_id: str
    url: str
    state: EngineState
    version: int
    """What it serves; -1 before the first load."""
    staged: int = -1
    """The newest version that it has whole and verified: the folder's digests, or what a push brought."""
    reading: list[int] = []
    """Versions whose files it may still open."""
    tensor_parallel: int = 1
    worker: str = ""
    in_flight: int = 0
    """Episodes that the worker is playing on it."""
    limit: int = 0
    """How many it may play at present."""
    running: int = 0
    """Requests being decoded, of all workers; as the engine said last."""
    queued: int = 0
    kv_use: float = 0.0
    """Share of the KV cache that running requests hold."""
    group: str = ""
    """The weight group that it is in."""
    following: int = -1
    """The version whose push it takes part in."""
    receiving: int = -1
    """The version that is being pushed to it; it is paused and waits for the bytes."""
    refused: int = -1
    """The last version whose push it could not go on with."""
    trouble: str = ""
    """Why the newest version cannot be used, in words; empty while nothing is wrong."""


class PolicyBoard:
    """The `policy` hash and the `engines` registry. Safe to use from many processes."""

    def __init__(self, client: redis.Redis, run: str) -> None:
        self.client: Any = client  # redis-py types every answer as sync or async
        self.keys = Keys(run)
        self.pushes = PushBoard(client, self.keys)
        self._hold, self._let_go = client.register_script(_HOLD), client.register_script(_LET_GO)

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
        names = [self.keys.engine_alive(report.engine_id) for report in reports]
        alive = [sign is not None for sign in self.client.mget(names)] if names else []
        for report, lives in zip(reports, alive, strict=True):
            if not lives:
                self.client.hdel(self.keys.engines, report.engine_id)
        return [report for report, lives in zip(reports, alive, strict=True) if lives]

    # -- engines that several workers share ----------------------------------------------------------------------------

    def hold(self, url: str, worker: str, seconds: float) -> bool:
        """Hold the engine at `url` for so long, or longer if it is held already. False: another worker holds it."""
        return bool(self._hold([self.keys.engine_hold(url)], [worker, int(seconds * 1000)]))

    def let_go(self, url: str, worker: str) -> None:
        self._let_go([self.keys.engine_hold(url)], [worker])

    def note_pause(self, url: str, worker: str) -> None:
        """Before an engine is paused: whoever holds it next must know."""
        self.client.hset(self.keys.paused_engines, url, worker)

    def note_resume(self, url: str) -> None:
        self.client.hdel(self.keys.paused_engines, url)

    def may_be_paused(self, url: str) -> bool:
        return bool(self.client.hexists(self.keys.paused_engines, url))

    def _get(self, field: str) -> PolicyVersion | None:
        body = self.client.hget(self.keys.policy, field)
        return msgspec.json.decode(body, type=PolicyVersion) if body else None
