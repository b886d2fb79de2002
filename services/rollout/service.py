"""Wires one worker together: Redis, engine, retriever, the loops that run beside each other, and the way out."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import secrets
import socket
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from services.contract.codec import Codec
from services.contract.config import Config, ConfigError
from services.contract.groups import GroupStore
from services.contract.policy import PolicyBoard
from services.contract.store import connect
from services.contract.telemetry import Heartbeat
from services.rollout.attached_engine import AttachedEngine
from services.rollout.engine import Engine, Generation
from services.rollout.engine_process import usable_context
from services.rollout.engines import EnginePool, Member
from services.rollout.episode import Player
from services.rollout.grading import Grading
from services.rollout.keeper import Keeper
from services.rollout.own_engine import OwnEngine
from services.rollout.policy_watcher import PolicyWatcher
from services.rollout.retrieval import Retriever
from services.rollout.supervisor import Supervisor
from services.rollout.tasks import RunInThread, run_in
from services.rollout.version_files import VersionFiles
from services.rollout.worker import GOODBYE_S, Worker

logger = logging.getLogger("rollout")

HEARTBEAT_S, REPORT_S, SUMMARY_S = 1.0, 2.0, 30.0
REDIS_THREADS = 16


def worker_name() -> str:
    """Unique among all workers, also after a restart under the same process id."""
    return f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(3)}"


def log_folder(config: Config) -> Path:
    """`<run folder>/logs`; a temporary folder where that cannot be written."""
    folder = config.run.folder / "logs"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return Path(tempfile.gettempdir())
    return folder if os.access(folder, os.W_OK) else Path(tempfile.gettempdir())


async def serve(config: Config, stop: asyncio.Event) -> None:
    """Play groups until `stop` is set. Raises RedisAway, or what the worker cannot go on with."""
    if not (config.model_path / "config.json").exists():
        raise ConfigError(f"{config.model_path} is not a Hugging Face folder: run `prepare`, or set model.path")
    name, heartbeat = worker_name(), Heartbeat.from_environment()
    state = ["starting: waiting for Redis"]
    beating = asyncio.create_task(_beat(heartbeat, state))
    run = run_in(ThreadPoolExecutor(REDIS_THREADS, thread_name_prefix="redis"))
    try:
        client = await _unless(stop, run(connect, config.redis))
        store = client and await _unless(stop, run(GroupStore, client, config.run.name))
        if client is None or store is None:
            return
        state[0] = "starting: loading the tokenizer"
        codec = await asyncio.to_thread(Codec.load, config.model_path)
        members = make_members(config, PolicyBoard(client, config.run.name), name, run)
        async with Retriever(config.retriever.url, config.rollout) as retriever:
            player = Player(_from_no_seat, retriever.retrieve, codec, usable_context(config))
            worker = Worker(name, config.rollout, Keeper(store, Grading(config), run), player, EnginePool(members), run)
            await _serve_with(worker, state, stop)
    finally:
        beating.cancel()


def make_members(config: Config, board: PolicyBoard, worker: str, run: RunInThread) -> list[Member]:
    """The engines that the configuration names, or one of the worker's own; each with its policy watcher."""
    engines: list[Engine] = [AttachedEngine(config, url, board, worker, run) for url in config.rollout.engine.urls]
    engines = engines or [OwnEngine(config, log_folder(config) / f"engine-{worker}.log", worker)]
    files = VersionFiles(config)
    return [Member(engine, PolicyWatcher(files, board, engine, worker, run), config.rollout) for engine in engines]


async def _from_no_seat(*_: object) -> Generation:
    raise AssertionError("every episode is generated from its seat at an engine")


async def _serve_with(worker: Worker, state: list[str], stop: asyncio.Event) -> None:
    """The loops; when one fails or `stop` is set, the way out: no more groups, finish or hand back, leave the registry."""
    members = worker.engines.members
    logger.info("worker %s plays up to %d episodes at once", worker.name, sum(member.most for member in members))
    background = [
        asyncio.create_task(loop)
        for loop in (
            *(Supervisor(member.engine, member.watcher, worker.config.engine).run() for member in members),
            worker.engines.look(),
            worker.keep_leases(),
            worker.failure(),
            _report(worker),
            _narrate(worker, state),
        )
    ]
    taking = asyncio.create_task(worker.take_groups(stop))
    stopping = asyncio.create_task(stop.wait())
    try:
        done, _ = await asyncio.wait([*background, taking, stopping], return_when=asyncio.FIRST_COMPLETED)
        for task in done - {stopping, taking}:
            task.result()
        stop.set()
        await asyncio.wait([taking], timeout=GOODBYE_S)  # longer only while Redis is away
        await worker.drain()
    finally:
        stop.set()
        tasks: list[asyncio.Task[Any]] = [*background, taking, stopping]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.gather(*(member.engine.stop() for member in members))
        with contextlib.suppress(Exception):
            await asyncio.wait_for(asyncio.gather(*(member.watcher.leave() for member in members)), GOODBYE_S)
        logger.info("worker %s has left", worker.name)


async def _unless(stop: asyncio.Event, work: Any) -> Any:
    """The result of `work`; None if `stop` is set before it is there."""
    stopping = asyncio.ensure_future(stop.wait())
    await asyncio.wait([work, stopping], return_when=asyncio.FIRST_COMPLETED)
    stopping.cancel()
    return work.result() if work.done() else None


async def _beat(heartbeat: Heartbeat, state: list[str]) -> None:
    while True:
        heartbeat.beat(state[0])
        await asyncio.sleep(HEARTBEAT_S)


async def _report(worker: Worker) -> None:
    while True:
        await asyncio.gather(*(member.watcher.report() for member in worker.engines.members))
        await asyncio.sleep(REPORT_S)


async def _narrate(worker: Worker, state: list[str]) -> None:
    """Keep the heartbeat's words true, and log a summary now and then."""
    ticks = 0
    while True:
        in_flight = worker.engines.in_flight
        state[0] = worker.engines.describe() + f", {in_flight} episodes in flight"
        ticks += 1
        if ticks % int(SUMMARY_S / HEARTBEAT_S) == 0 and (line := worker.statistics.summary(in_flight)):
            logger.info(line)
        await asyncio.sleep(HEARTBEAT_S)
