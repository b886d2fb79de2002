"""What a person should look at, and where. Pure: a status in, sentences out."""

from __future__ import annotations

from collections.abc import Iterator

from services.contract.config import Config
from services.contract.telemetry import format_seconds
from services.suite.observe import Queues, Snapshot
from services.suite.plan import HEARTBEAT_MAX_AGE_S
from services.suite.run_files import Part, Progress

FULL = 0.9
"""Share of Redis's memory limit from which a person should know."""


def redis_attention(config: Config, seen: Snapshot) -> Iterator[str]:
    """What the streams, the registry and the server show."""
    if not seen.balanced:
        yield f"the accounts do not add up, a group is missing or counted twice: {seen.accounts}"
    yield from _engines(seen)
    yield from _queues(config, seen.queues)
    if seen.dead:
        last = min(seen.dead, key=lambda dead: dead.age_s)
        yield f"{seen.accounts.dead} group(s) given up, the last {format_seconds(last.age_s)} ago: {last.reason}"
    if not seen.server.writes_ok:
        yield "Redis could not write its append-only file: is its disk full?"
    if seen.server.memory_limit and seen.server.memory_bytes > FULL * seen.server.memory_limit:
        yield f"Redis uses {seen.server.memory_bytes / seen.server.memory_limit:.0%} of its memory: raise maxmemory"
    if seen.unreadable:
        yield f"{seen.unreadable} record(s) in Redis cannot be read by this version of forage"


def _engines(seen: Snapshot) -> Iterator[str]:
    alive = [engine for engine in seen.engines if engine.reported_s is not None]
    if seen.accounts.waiting and not alive:
        yield f"{seen.accounts.waiting} group(s) wait and no engine is alive: is a rollout worker running?"
    for engine in seen.engines:
        if engine.reported_s is None:
            yield f"engine {engine.engine_id} has fallen silent"
        elif engine.state == "stale":
            reason = engine.trouble or "see its worker's log"
            yield f"engine {engine.engine_id} cannot load version {seen.current} and takes no new group: {reason}"


def _queues(config: Config, queues: Queues) -> Iterator[str]:
    if queues.silent_s is not None and queues.silent_s > config.rollout.lease_s:
        silence = format_seconds(queues.silent_s)
        yield f"worker {queues.silent_by} has shown no sign of life for {silence}: its groups wait for another to take them over"
    if queues.ungraded_s is not None and queues.ungraded_s > 2 * config.reward.time_limit_s:
        yield f"a finished group has waited {format_seconds(queues.ungraded_s)} to be graded: is a reward worker running?"


def file_attention(progress: Progress, parts: list[Part]) -> Iterator[str]:
    """What the run's folder shows."""
    if progress.problem:
        yield progress.problem
    yield from progress.warnings
    for part in parts:
        if part.age_s > HEARTBEAT_MAX_AGE_S:
            yield f"{part.name} gave its last heartbeat {format_seconds(part.age_s)} ago ({part.state})"
