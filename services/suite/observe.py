"""What Redis knows of a run, read without changing anything there.

Ages are by Redis's own clock: entry ids of streams are its milliseconds.
"""

from __future__ import annotations

import re
from collections import Counter
from typing import Any

import msgspec
import redis

from services.contract.accounts import Accounts
from services.contract.config import Config
from services.contract.grading import grading_queue
from services.contract.groups import ROLLOUT_GROUP, TRAINER_GROUP, GroupStore
from services.contract.messages import DeadLetter, decode_dead
from services.contract.policy import ALIVE_S, EngineReport, PolicyVersion
from services.contract.store import Keys
from services.suite.redis_address import hasty_client
from services.suite.speed import Speed, Speedometer
from services.suite.tolerant import Tolerant

LEASES_LOOKED_AT, LETTERS_LOOKED_AT, EVENTS_SHOWN = 1000, 500, 8
LOOK_ERRORS = (redis.RedisError, OSError)
"""What a look may run into; `redis_address.problem_in_words` says it to a person."""
_NUMBERS = re.compile(r"\d+")


class NoRun(Exception):
    """Redis answers, but holds nothing of this run. The message names the runs that it does hold."""


class Engine(msgspec.Struct, frozen=True):
    engine_id: str
    state: str
    version: int
    staged: int
    url: str
    tensor_parallel: int
    reported_s: float | None
    """Seconds since its last report; None: longer ago than an engine may be silent, so it counts as gone."""
    groups: int
    """Groups that its worker holds now."""
    tokens_per_s: float
    """Of trajectories that were graded in the last minute."""
    trouble: str = ""
    """Why it cannot use the newest version, in its worker's words."""


class Queues(msgspec.Struct, frozen=True):
    """Ages in seconds of the oldest; None: there is none, or nobody noted its time."""

    waiting_s: float | None
    """Since it was fed or handed back."""
    leased_s: float | None
    """Since it was fed or handed back, too; a lease does not say when it began."""
    leased_by: str
    silent_s: float | None
    """Of all leases, the longest time without a sign of life from the worker."""
    silent_by: str
    ungraded_s: float | None
    """Since its worker finished it."""
    graded_s: float | None
    """Of the notices that the trainer has not read yet."""
    grading: int
    """Messages that wait for a grader."""
    in_hand: int
    """Messages that a grader has taken."""


class DeadReason(msgspec.Struct, frozen=True):
    """Dead letters whose reasons differ in nothing but numbers."""

    count: int
    reason: str
    """Of the latest."""
    latest: str
    """Its group."""
    age_s: float


class Event(msgspec.Struct, frozen=True):
    age_s: float
    text: str


class Server(msgspec.Struct, frozen=True):
    memory_bytes: int
    memory_limit: int
    """0: none."""
    clients: int
    writes_ok: bool
    """Whether the append-only file took the last write."""


class Snapshot(msgspec.Struct, frozen=True):
    """One look at Redis."""

    server: Server
    accounts: Accounts
    balanced: bool
    current: int | None
    """The policy version that engines are to serve."""
    staged: int | None
    engines: list[Engine]
    queues: Queues
    speed: Speed
    dead: list[DeadReason]
    events: list[Event]
    unreadable: int
    """Records that this version of forage cannot read."""


class Observer:
    """Looks at one run again and again. It holds no more than the last minute's trajectories, for the speed."""

    def __init__(self, config: Config) -> None:
        self.config, self.keys = config, Keys(config.run.name)
        self.client: Any = hasty_client(config)  # redis-py types every answer as sync or async
        self.broker: Any = hasty_client(config, config.reward.database)
        self.speedometer = Speedometer(self.client, self.keys)
        self._store: GroupStore | None = None
        self._records = Tolerant()

    def look(self) -> Snapshot:
        """Raises NoRun, redis.RedisError."""
        self._records = Tolerant()
        if not self.client.exists(self.keys.prompts):
            raise NoRun(self._no_run())
        # Only now: a store makes the streams of its run where they are missing, and looking must not.
        self._store = self._store or GroupStore(self.client, self.config.run.name)
        seconds, microseconds = self.client.time()
        now = seconds + microseconds / 1e6
        accounts, speed = self._store.accounts(), self.speedometer.look(now, self._records)
        current, staged = self._policy()
        return Snapshot(
            server=self._server(),
            accounts=accounts,
            balanced=_balanced(accounts),
            current=current,
            staged=staged,
            engines=self._engines(speed),
            queues=self._queues(now),
            speed=speed,
            dead=self._dead(now),
            events=self._events(now),
            unreadable=self._records.unreadable,
        )

    def _no_run(self) -> str:
        found = {key.decode(errors="replace") for key in self.client.scan_iter("forage:*:prompts", count=1000, _type="stream")}
        names = sorted(key.removeprefix("forage:").removesuffix(":prompts") for key in found)
        others = f"; it knows {', '.join(names)}" if names else ""
        return f"Redis at {self.config.redis.url} knows no run {self.config.run.name} yet{others}"

    def _server(self) -> Server:
        info = self.client.info()
        return Server(
            memory_bytes=info.get("used_memory", 0),
            memory_limit=info.get("maxmemory", 0),
            clients=info.get("connected_clients", 0),
            writes_ok=info.get("aof_last_write_status", "ok") == "ok",
        )

    def _policy(self) -> tuple[int | None, int | None]:
        """The current and the staged version."""
        decode = msgspec.json.Decoder(PolicyVersion).decode
        bodies = self.client.hmget(self.keys.policy, "current", "staged")
        found = [self._records.read(decode, body) if body else None for body in bodies]
        return tuple(policy.version if policy else None for policy in found)  # type: ignore[return-value]

    # -- engines -------------------------------------------------------------------------------------------------------

    def _engines(self, speed: Speed) -> list[Engine]:
        """All that are registered, those that fell silent too: `PolicyBoard.live_engines` would take these off."""
        decode = msgspec.json.Decoder(EngineReport).decode
        bodies = self.client.hvals(self.keys.engines)
        reports: list[EngineReport] = [report for body in bodies if (report := self._records.read(decode, body))]
        with self.client.pipeline(transaction=False) as pipe:
            for report in reports:
                pipe.pttl(self.keys.engine_alive(report.engine_id))
            left = pipe.execute()
        held = {c["name"].decode(): c["pending"] for c in self.client.xinfo_consumers(self.keys.prompts, ROLLOUT_GROUP)}
        engines = [
            Engine(
                engine_id=report.engine_id,
                state=report.state,
                version=report.version,
                staged=report.staged,
                url=report.url,
                tensor_parallel=report.tensor_parallel,
                reported_s=ALIVE_S - milliseconds / 1000 if milliseconds > 0 else None,
                groups=held.get(report.worker, 0),
                tokens_per_s=speed.by_worker.get(report.worker, 0.0),
                trouble=report.trouble,
            )
            for report, milliseconds in zip(reports, left, strict=True)
        ]
        return sorted(engines, key=lambda engine: engine.engine_id)

    # -- queues --------------------------------------------------------------------------------------------------------

    def _queues(self, now: float) -> Queues:
        leases = self.client.xpending_range(self.keys.prompts, ROLLOUT_GROUP, "-", "+", LEASES_LOOKED_AT)
        oldest = leases[0] if leases else {}
        silent = max(leases, key=lambda lease: lease["time_since_delivered"], default={})
        return Queues(
            waiting_s=self._oldest_unread(now, self.keys.prompts, ROLLOUT_GROUP),
            leased_s=_age(now, oldest["message_id"]) if oldest else None,
            leased_by=oldest.get("consumer", b"").decode(errors="replace"),
            silent_s=silent["time_since_delivered"] / 1000 if silent else None,
            silent_by=silent.get("consumer", b"").decode(errors="replace"),
            ungraded_s=self._oldest_ungraded(now),
            graded_s=self._oldest_unread(now, self.keys.graded, TRAINER_GROUP),
            grading=self.broker.llen(grading_queue(self.config.run.name)),
            in_hand=self.broker.hlen("unacked"),
        )

    def _oldest_unread(self, now: float, stream: str, group: str) -> float | None:
        """Age of the first entry after the last that was given to a consumer."""
        groups = {found["name"]: found for found in self.client.xinfo_groups(stream)}
        last = groups.get(group.encode(), {}).get("last-delivered-id", b"0-0").decode()
        entries = self.client.xrange(stream, min=f"({last}", count=1)
        return _age(now, entries[0][0]) if entries else None

    def _oldest_ungraded(self, now: float) -> float | None:
        """By the time that `finish` notes behind the number of samples."""
        graded = self.client.hgetall(self.keys.graded_samples)
        finished = [(group, state.split()) for group, state in self.client.hgetall(self.keys.states).items()]
        times = [
            float(state[2])
            for group, state in finished
            if state[0] == b"finished" and len(state) > 2 and int(graded.get(group, 0)) < int(state[1])
        ]
        return max(now - min(times), 0.0) if times else None

    # -- news ----------------------------------------------------------------------------------------------------------

    def _dead(self, now: float) -> list[DeadReason]:
        """The latest letters by reason, the most frequent first."""
        letters: list[tuple[bytes, DeadLetter]] = []
        for entry_id, fields in self.client.xrevrange(self.keys.dead, count=LETTERS_LOOKED_AT):
            if letter := self._records.read(decode_dead, fields.get(b"body", b"")):
                letters.append((entry_id, letter))
        counts = Counter(_kind(letter.reason) for _, letter in letters)
        latest = {_kind(letter.reason): (entry_id, letter) for entry_id, letter in reversed(letters)}
        return [
            DeadReason(number, latest[kind][1].reason, latest[kind][1].group_id, _age(now, latest[kind][0]))
            for kind, number in counts.most_common()
        ]

    def _events(self, now: float) -> list[Event]:
        """The latest first."""
        entries = self.client.xrevrange(self.keys.events, count=EVENTS_SHOWN)
        return [Event(_age(now, entry_id), fields.get(b"event", b"").decode(errors="replace")) for entry_id, fields in entries]


def _kind(reason: str) -> str:
    """Reasons that differ in numbers only are one kind."""
    return _NUMBERS.sub("#", reason)


def _age(now: float, entry_id: bytes) -> float:
    return max(now - int(entry_id.partition(b"-")[0]) / 1000, 0.0)


def _balanced(accounts: Accounts) -> bool:
    try:
        accounts.check()
    except AssertionError:
        return False
    return True
