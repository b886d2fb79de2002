"""Pushes into an engine that runs elsewhere: a real SGLang that the test owns, and two workers that are attached to it."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack
from pathlib import Path

import pytest
import pytest_asyncio

from services.contract import weights
from services.contract.config import Config
from services.rollout.attached_engine import AttachedEngine
from services.rollout.own_engine import OwnEngine
from services.rollout.tasks import run_in
from tests.rollout.fleet import Fleet, Minded, until_written

pytestmark = [pytest.mark.asyncio(loop_scope="session"), pytest.mark.timeout(900)]  # an engine is started in it
TOLERANCE = 1e-3


@pytest_asyncio.fixture(loop_scope="session")
async def workers(fleet: Fleet, served: OwnEngine) -> AsyncIterator[list[Minded]]:
    """Two workers attached to one engine, which serves version 0."""
    config = with_engine(fleet.config, urls=[served.url])
    pool = ThreadPoolExecutor(4)
    async with AsyncExitStack() as stack:
        minded = []
        for worker in ("first", "second"):
            engine = AttachedEngine(config, served.url, fleet.board, worker, run_in(pool))
            stack.push_async_callback(engine.stop)
            minded.append(await stack.enter_async_context(fleet.worker(engine, engine.name)))
        await asyncio.gather(*(each.until_serves(0) for each in minded))
        yield minded
    pool.shutdown()


def with_engine(config: Config, **settings: object) -> Config:
    engine = config.rollout.engine.model_copy(update=settings)
    return config.model_copy(update={"rollout": config.rollout.model_copy(update={"engine": engine})})


async def restarted_by_its_owner(engine: OwnEngine, model: Path) -> None:
    """Killed, and started anew at the same address, with the model it was started with before."""
    assert engine.pid
    port = int(engine.url.rpartition(":")[2])
    os.killpg(engine.pid, signal.SIGKILL)
    await engine.stop()
    engine.run_config = with_engine(engine.run_config, port=port)
    await engine.start(str(model), 0)


async def test_an_attached_engine_that_its_owner_started_anew_is_in_the_next_push_again(
    fleet: Fleet, workers: list[Minded], served: OwnEngine, variants: list[Path]
) -> None:
    await fleet.publish(1, variants[1])
    assert not weights.is_published(fleet.publisher.root, 1), "the push went through"
    for minded in workers:
        await minded.until_serves(1)
        assert await minded.gap(variants[1], 1) < TOLERANCE
    await restarted_by_its_owner(served, variants[0])
    await until_written(fleet, 1)
    for minded in workers:
        await minded.until_serves(1)
        assert await minded.gap(variants[1], 1) < TOLERANCE
    await fleet.publish(2, variants[2])
    assert not weights.is_published(fleet.publisher.root, 2), "the push went through, in a group made anew"
    for minded in workers:
        await minded.until_serves(2)
        assert await minded.gap(variants[2], 2) < TOLERANCE
