"""Real engines under a worker's own supervision, a publisher, and a clock on every pause."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import redis

from services.contract.config import WeightsConfig
from services.rollout.own_engine import OwnEngine
from tests.conftest import RedisServer
from tests.factories import make_sampling
from tests.rollout.conftest import make_config
from tests.rollout.fleet import Fleet, Minded

TURN_TOKENS = 64
BUCKET_BYTES = WeightsConfig().bucket_bytes


class ClockedEngine(OwnEngine):
    """Notes how long it was paused last."""

    paused_at = paused_s = 0.0

    async def pause(self) -> None:
        self.paused_at = time.perf_counter()
        await super().pause()

    async def resume(self) -> None:
        await super().resume()
        self.paused_s = time.perf_counter() - self.paused_at


@dataclass(frozen=True)
class Update:
    whole_s: float
    """From the trainer's weights to the engines that serve them and a synced folder on the volume."""
    pushed_s: float
    """From the first bucket until every engine has loaded and checked them all; 0 over the volume."""
    paused_s: float
    """The engine that stood still for longest."""


@contextlib.asynccontextmanager
async def engines(model: Path, folder: Path, count: int, **section: Any) -> AsyncIterator[tuple[Fleet, list[Minded]]]:
    folder.mkdir(parents=True, exist_ok=True)
    server = RedisServer(folder)
    server.start()
    client = redis.Redis(port=int(server.url.rpartition(":")[2].partition("/")[0]))
    fleet = Fleet(client, model, folder, **section)
    async with contextlib.AsyncExitStack() as stack:
        minded = []
        for number in range(count):
            engine = ClockedEngine(make_config(model, folder), folder / f"engine{number}.log", f"e{number}")
            stack.push_async_callback(engine.stop)
            minded.append(await stack.enter_async_context(fleet.worker(engine, f"e{number}")))
        await asyncio.gather(*(each.until_serves(0, 900) for each in minded))
        yield fleet, minded
        fleet.publisher.close()
    server.kill()


async def measure_push(model: Path, folder: Path, rounds: int, count: int) -> dict[str, list[float]]:
    """Seconds of each round: `pushed`, and `paused` of the engine that stood still for longest. Nothing goes to the volume."""
    async with engines(model, folder, count, bucket_bytes=BUCKET_BYTES) as (fleet, minded):
        updates = [await update(fleet, minded, model, version) for version in range(1, rounds + 2)][1:]  # the first one joins
    return {"pushed": [each.pushed_s for each in updates], "paused": [each.paused_s for each in updates]}


async def measure_pause(model: Path, folder: Path, rounds: int, transport: str) -> list[Update]:
    """Updates of one engine that decodes all the time; every version goes to the volume too."""
    async with engines(model, folder, 1, transport=transport, volume_every=1, bucket_bytes=BUCKET_BYTES) as (fleet, minded):
        turns = asyncio.create_task(decode(minded[0]))
        updates = [await update(fleet, minded, model, version) for version in range(1, rounds + 2)][1:]
        turns.cancel()
        await asyncio.gather(turns, return_exceptions=True)
    return updates


async def decode(minded: Minded) -> None:
    while True:
        await asyncio.gather(*(minded.engine.generate([10, 20, 30 + n], make_sampling(), TURN_TOKENS) for n in range(4)))


async def update(fleet: Fleet, minded: list[Minded], model: Path, version: int) -> Update:
    started = time.perf_counter()
    await fleet.publish(version, model)
    for each in minded:
        await each.until_serves(version)
    times = fleet.publisher.last_push
    pushed_s = times.sending + times.checking if times else 0.0
    return Update(time.perf_counter() - started, pushed_s, max(each.engine.paused_s for each in minded))
