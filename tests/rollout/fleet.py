"""A fleet of real engines as their workers mind them, and a trainer that publishes a folder's weights to it."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import redis
from safetensors.torch import load_file

from services.contract import weights
from services.contract.config import Config
from services.contract.policy import PolicyBoard, PolicyVersion
from services.rollout.engine import Engine
from services.rollout.own_engine import OwnEngine
from services.rollout.policy_watcher import PolicyWatcher
from services.rollout.supervisor import Supervisor
from services.rollout.tasks import run_in
from services.rollout.version_files import VersionFiles
from services.trainer.publishing.publish import Publisher
from tests.factories import make_sampling
from tests.rollout.conftest import make_config
from tests.rollout.tiny_model import reference_logprobs

PROMPT = list(range(10, 40))
COLLECTIVE = {"transport": "collective", "bucket_bytes": 1 << 16, "volume_every": 100, "push_lease_s": 2, "push_timeout_s": 30}


class Running:
    """A real engine that is started only when it does not run already: starting one takes half a minute."""

    def __init__(self, engine: OwnEngine, name: str) -> None:
        self.engine, self.name = engine, name

    def __getattr__(self, attribute: str) -> Any:
        return getattr(self.engine, attribute)

    def __setattr__(self, attribute: str, value: Any) -> None:
        setattr(self.engine, attribute, value) if attribute == "version" else super().__setattr__(attribute, value)

    async def start(self, model: str, version: int) -> None:
        if not self.engine.running:
            await self.engine.start(model, version)
        elif await self.engine.reported_version() != str(version):
            await self.engine.update(model, version)


class Minded:
    """An engine under the worker's own supervisor and policy watcher."""

    def __init__(self, engine: Any, watcher: PolicyWatcher) -> None:
        self.engine, self.watcher = engine, watcher

    async def until_serves(self, version: int, timeout_s: float = 60) -> None:
        async with asyncio.timeout(timeout_s):
            while (self.watcher.state, self.watcher.version) != ("ready", version):
                await asyncio.sleep(0.05)

    async def gap(self, model: Path, version: int) -> float:
        """How far its log-probs are from what transformers gives the same tokens by `model`; its answer must be by `version`."""
        turn = await self.engine.generate(PROMPT, make_sampling(), 24)
        assert {span.version for span in turn.versions} == {version}
        expected = reference_logprobs(model, PROMPT, turn.ids, 1.0)
        return max(abs(a - b) for a, b in zip(turn.logprobs, expected, strict=True))


class Fleet:
    def __init__(self, client: redis.Redis, model: Path, folder: Path, **weights: Any) -> None:
        port = client.connection_pool.connection_kwargs["port"]
        config = make_config(model, folder, f"redis://127.0.0.1:{port}/0")
        self.config = config_with_weights(config, **(COLLECTIVE | weights))
        self.board = PolicyBoard(client, self.config.run.name)
        self.board.commit(PolicyVersion(0, str(model)))
        self.publisher = Publisher(self.config, self.board, check_stop=lambda: None)

    def trainer_config(self, volume_every: int, **trainer: Any) -> Config:
        """For a trainer that is a process, or several, of its own."""
        trained = self.config.model_dump() | {"trainer": {"threads": 1} | trainer}
        return config_with_weights(Config.model_validate(trained), volume_every=volume_every)

    async def publish(self, version: int, model: Path) -> None:
        """What the trainer does after a step that ended with the weights of `model`."""
        tensors = load_file(model / "model.safetensors")
        await asyncio.to_thread(self.publisher.publish, version, version - 1, lambda: iter(tensors.items()))

    @contextlib.asynccontextmanager
    async def worker(self, engine: Engine, name: str) -> AsyncIterator[Minded]:
        """Leaving it is a worker's death: no goodbye, but its heartbeat's end is not waited for."""
        pool = ThreadPoolExecutor(4)
        running = Running(engine, name) if isinstance(engine, OwnEngine) else engine
        watcher = PolicyWatcher(VersionFiles(self.config), self.board, running, name, run_in(pool))  # type: ignore[arg-type]
        supervisor = Supervisor(running, watcher, self.config.rollout.engine)  # type: ignore[arg-type]
        loops = [asyncio.create_task(supervisor.run()), asyncio.create_task(_report(watcher))]
        try:
            yield Minded(running, watcher)
        finally:
            for loop in loops:
                loop.cancel()
            await asyncio.gather(*loops, return_exceptions=True)
            self.board.remove(name)
            pool.shutdown()


async def until_written(fleet: Fleet, version: int) -> None:
    """The trainer waits for groups meanwhile, and looks after late engines as it does so."""
    async with asyncio.timeout(60):
        while not weights.is_published(fleet.publisher.root, version):
            await asyncio.to_thread(fleet.publisher.wait)
            await asyncio.sleep(0.1)


def config_with_weights(config: Config, **weights: Any) -> Config:
    section = config.weights.model_copy(update=weights)
    return Config.model_validate(config.model_copy(update={"weights": section}).model_dump())


async def _report(watcher: PolicyWatcher) -> None:
    while True:
        await watcher.report()
        await asyncio.sleep(0.2)
