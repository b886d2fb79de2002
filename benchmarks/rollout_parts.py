"""What the rollout benchmarks are made of: Redis, a simulated engine and retriever in processes of their own, the real worker."""

from __future__ import annotations

import asyncio
import contextlib
import json
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import redis

from services.contract.codec import Codec
from services.contract.config import Config, show_config
from services.contract.groups import GroupStore
from services.contract.messages import PromptGroup, Sampling, Trajectory
from services.contract.policy import PolicyBoard, PolicyVersion
from services.contract.store import connect
from services.rollout.service import serve
from tests.conftest import RedisServer, free_port
from tests.rollout.conftest import RUN
from tests.rollout.tiny_model import make_model

CONTEXT = 4096


class Parts:
    """One benchmark's surroundings. `engine` sets keys of [rollout.engine], `rollout` those of [rollout]."""

    def __init__(self, folder: Path, model: Path | None = None) -> None:
        self.folder, self.trained = folder, model is not None
        self.model = model or make_long_model(folder / "model")
        self.codec = Codec.load(self.model)
        self.server = RedisServer(folder)
        self.server.start()
        self.ports = {"engine": free_port(), "retriever": free_port()}
        self._processes: list[subprocess.Popen[bytes]] = []

    def configure(self, engine: dict[str, Any] | None = None, **rollout: Any) -> Config:
        simulated = {"urls": [f"http://127.0.0.1:{self.ports['engine']}"]}
        return Config.model_validate(
            {
                "run": {"name": RUN, "directory": str(self.folder / "runs")},
                "model": {"source": "folder", "path": str(self.model), "max_context": CONTEXT},
                "retriever": {"url": f"http://127.0.0.1:{self.ports['retriever']}"},
                "weights": {"directory": str(self.folder / "weights")},
                "redis": {"url": self.server.url},
                "rollout": {"max_response_tokens": CONTEXT - 512, "engine": engine or simulated} | rollout,
            }
        )

    def simulate(self, turns: list[list[int]], turn_s: float, spread: float = 0.0, passage: int = 0) -> None:
        """Start the simulated engine and retriever."""
        engine = ["fake_engine", "--turns", json.dumps(turns), "--turn-s", str(turn_s), "--spread", str(spread)]
        self._start(*engine, "--port", str(self.ports["engine"]))
        self.simulate_retriever(passage)

    def simulate_retriever(self, passage: int = 0) -> None:
        self._start("fake_retriever", "--port", str(self.ports["retriever"]), "--length", str(passage))

    def _start(self, module: str, *arguments: str) -> None:
        self._processes.append(subprocess.Popen([sys.executable, "-m", f"tests.rollout.{module}", *arguments]))

    def start_service(self, service: str, config: Config) -> None:
        """A real service as a process, on the same configuration."""
        path = self.folder / "run.toml"
        path.write_text(show_config(config))
        command = [sys.executable, "-m", f"services.{service}", "--config", str(path)]
        self._processes.append(subprocess.Popen(command, stdout=subprocess.DEVNULL))

    def streams(self, config: Config) -> tuple[GroupStore, PolicyBoard]:
        """Emptied, with the model as version 0."""
        redis.Redis(port=self.server.port).flushall()
        client = connect(config.redis)
        store, board = GroupStore(client, RUN), PolicyBoard(client, RUN)
        board.commit(PolicyVersion(0, str(self.model)))
        return store, board

    def close(self) -> None:
        for process in self._processes:
            process.kill()
            process.wait()
        self.server.kill()


def make_long_model(folder: Path) -> Path:
    """The tests' tiny trained model, allowed longer episodes than it was made for."""
    config = make_model(folder) / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"max_position_embeddings": 2 * CONTEXT}))
    return folder


@contextlib.asynccontextmanager
async def worker(config: Config, board: PolicyBoard) -> AsyncIterator[None]:
    """The whole rollout service in this process, so that its CPU time can be read; ready when the block begins."""
    stop = asyncio.Event()
    serving = asyncio.create_task(serve(config, stop))
    await until(lambda: any(report.state == "ready" for report in board.live_engines()))
    try:
        yield
    finally:
        stop.set()
        await serving


async def until(holds: Callable[[], Any], every_s: float = 0.1) -> None:
    while not await asyncio.to_thread(holds):
        await asyncio.sleep(every_s)


def make_group(index: int, samples: int, prompt: list[dict[str, str]] | None = None, **sampling: Any) -> PromptGroup:
    values: dict[str, Any] = {
        "temperature": 1.0,
        "top_p": 1.0,
        "max_turn_tokens": 512,
        "max_response_tokens": CONTEXT - 512,
        "max_observation_tokens": 600,
        "max_searches": 3,
        "topk": 3,
    }
    return PromptGroup(
        group_id=f"g{index}",
        purpose="train",
        example_id=f"capital:{index}",
        source="capital",
        question="What is the capital of France?",
        golden_answers=["Paris"],
        prompt=prompt or [{"role": "user", "content": "What is the capital of France?"}],
        samples=samples,
        sampling=Sampling(**(values | sampling)),
        issued_version=0,
        deadline_s=3600,
    )


def trajectories(store: GroupStore, groups: list[PromptGroup]) -> list[Trajectory]:
    return [t for group in groups for t in store.load_many(group.trajectory_ids()) if t]


class Clock:
    """Wall seconds and this process's CPU seconds since it was made."""

    def __init__(self) -> None:
        self._wall, self._cpu = time.perf_counter(), time.process_time()

    @property
    def wall(self) -> float:
        return time.perf_counter() - self._wall

    @property
    def cpu(self) -> float:
        return time.process_time() - self._cpu
