"""One tiny trained model and one real SGLang engine for all rollout tests; a worker of the test's own on top of them."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import pytest_asyncio
import redis

from services.contract.codec import Codec
from services.contract.config import Config
from services.contract.groups import GroupStore
from services.contract.policy import PolicyBoard, PolicyVersion
from services.rollout.engine import Engine
from services.rollout.engine_process import usable_context
from services.rollout.engines import EnginePool, Member
from services.rollout.episode import Generate, Player
from services.rollout.grading import Grading
from services.rollout.keeper import Keeper
from services.rollout.own_engine import OwnEngine
from services.rollout.policy_watcher import PolicyWatcher
from services.rollout.retrieval import Retriever
from services.rollout.tasks import run_in
from services.rollout.version_files import VersionFiles
from services.rollout.worker import Worker
from tests.rollout.standins import StandInRetriever
from tests.rollout.tiny_model import make_model, make_variant

if TYPE_CHECKING:
    from tests.rollout.fleet import Fleet

RUN = "test"


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("tiny") / "policy")


@pytest.fixture(scope="session")
def codec(tiny_model: Path) -> Codec:
    return Codec.load(tiny_model)


@pytest.fixture
def retriever() -> Iterator[StandInRetriever]:
    server = StandInRetriever()
    yield server
    server.close()


def make_config(model: Path, folder: Path, redis_url: str = "redis://127.0.0.1:1/0", url: str = "", **rollout: Any) -> Config:
    engine = {"threads": 1, "max_total_tokens": 8192, "start_timeout_s": 900, "health_interval_s": 2, "log_level": "info"}
    values = {"concurrency": 8, "lease_s": 2, "retrieval_retries": 2, "max_attempts": 2, "engine": engine} | rollout
    return Config.model_validate(
        {
            "run": {"name": RUN, "directory": str(folder / "runs")},
            "model": {"source": "folder", "path": str(model), "max_context": 512},
            "retriever": {"url": url or "http://127.0.0.1:1"},
            "weights": {"directory": str(folder / "weights")},
            "redis": {"url": redis_url, "retry_s": 30},
            "rollout": {"max_response_tokens": 256} | values,
        }
    )


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def engine(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[OwnEngine]:
    """The real SGLang, started once; it serves the tiny model as version 0 at the start of each test that asks for `served`."""
    folder = tmp_path_factory.mktemp("engine")
    engine = OwnEngine(make_config(tiny_model, folder), folder / "engine.log")
    await engine.start(str(tiny_model), 0)
    yield engine
    await engine.stop()


@pytest_asyncio.fixture(loop_scope="session")
async def served(engine: OwnEngine, tiny_model: Path) -> OwnEngine:
    """The engine, running, with version 0."""
    if not engine.running:
        await engine.start(str(tiny_model), 0)
    elif await engine.reported_version() != "0":
        await engine.update(str(tiny_model), 0)
    return engine


class Generating:
    """The real engine, but for its `generate`."""

    def __init__(self, engine: Engine, generate: Generate) -> None:
        self._engine, self.generate = engine, generate

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)


class Bench:
    """Redis, the engine and the retriever, on which a test runs workers of its own in this process."""

    def __init__(self, client: redis.Redis, model: Path, folder: Path, url: str, engine: OwnEngine) -> None:
        redis_url = f"redis://127.0.0.1:{client.connection_pool.connection_kwargs['port']}/0"
        self.client, self.model, self.engine = client, model, engine
        self.configure: Callable[..., Config] = lambda **rollout: make_config(model, folder, redis_url, url, **rollout)
        self.config = self.configure()
        self.store, self.board = GroupStore(client, RUN), PolicyBoard(client, RUN)
        self.board.commit(PolicyVersion(0, str(model)))

    @contextlib.asynccontextmanager
    async def worker(self, name: str = "w", generate: Generate | None = None, **rollout: Any) -> AsyncIterator[Worker]:
        """A worker with all its loops but the supervisor's, over the engine that already runs; leaving kills it: no goodbye."""
        config = self.configure(**rollout)
        pool = ThreadPoolExecutor(8)
        engine = self.engine if generate is None else Generating(self.engine, generate)
        watcher = PolicyWatcher(VersionFiles(config), self.board, engine, name, run_in(pool))  # type: ignore[arg-type]
        members = [Member(engine, watcher, config.rollout)]  # type: ignore[arg-type]
        async with Retriever(config.retriever.url, config.rollout) as retriever:
            player = Player(self.engine.generate, retriever.retrieve, Codec.load(self.model), usable_context(config))
            keeper = Keeper(self.store, Grading(config), run_in(pool))
            worker = Worker(name, config.rollout, keeper, player, EnginePool(members), run_in(pool))
            await watcher.serves(int(await self.engine.reported_version()))
            stop = asyncio.Event()
            worker.stop = stop  # type: ignore[attr-defined]
            taking = asyncio.create_task(worker.take_groups(stop))
            loops = [asyncio.create_task(loop) for loop in (worker.keep_leases(), _follow(watcher), worker.engines.look())]
            try:
                yield worker
            finally:
                stop.set()
                await taking
                for task in (*loops, *(playing.task for playing in worker._playing.values())):
                    task.cancel()
                await asyncio.gather(*loops, return_exceptions=True)
                pool.shutdown()

    async def until(self, condition: Callable[[], Any], timeout_s: float = 60) -> Any:
        """Wait for something to become true and return it."""
        async with asyncio.timeout(timeout_s):
            while not (result := await asyncio.to_thread(condition)):
                await asyncio.sleep(0.05)
        return result

    def requested(self) -> list[str]:
        """Ids of the trajectories that graders were asked for, from Celery's own queue."""
        import base64
        import json

        port = self.client.connection_pool.connection_kwargs["port"]
        bodies = redis.Redis(port=port, db=self.config.reward.database).lrange(f"forage.{RUN}.grade", 0, -1)
        messages = [json.loads(body) for body in bodies]  # type: ignore[union-attr]
        return [json.loads(base64.b64decode(message["body"]))[0][0] for message in messages]


async def _follow(watcher: PolicyWatcher) -> None:
    while True:
        await watcher.follow()
        await asyncio.sleep(0.05)


@pytest_asyncio.fixture(loop_scope="session")
async def bench(
    redis_client: redis.Redis, tiny_model: Path, tmp_path: Path, retriever: StandInRetriever, served: OwnEngine
) -> Bench:
    return Bench(redis_client, tiny_model, tmp_path, retriever.url, served)


@pytest.fixture(scope="session")
def variants(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The starting model, and the weights of versions 1 and 2."""
    folders = [tmp_path_factory.mktemp(f"variant{number}") for number in (1, 2)]
    for folder, scale in zip(folders, (0.6, 0.8), strict=True):
        make_variant(tiny_model, folder, scale)
    return [tiny_model, *folders]


@pytest.fixture
def fleet(redis_client: redis.Redis, tiny_model: Path, tmp_path: Path) -> Iterator[Fleet]:
    from tests.rollout.fleet import Fleet  # which configures its engines as this file does

    fleet = Fleet(redis_client, tiny_model, tmp_path)
    yield fleet
    fleet.publisher.close()
