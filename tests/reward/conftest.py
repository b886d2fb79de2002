"""Real grading workers: `python -m services.reward` in a process group of its own, against a Redis of its own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest
import redis
from celery import Celery

from services.contract.config import Config, load_config
from services.contract.grading import grading_app
from services.contract.groups import GroupStore
from services.contract.messages import DeadLetter, GradedNotice
from services.contract.store import connect
from tests.conftest import RedisServer
from tests.factories import make_group, make_trajectory

SETTINGS = """
[run]
name = "test"
[reward]
concurrency = 1
soft_time_limit_s = 1
time_limit_s = 1.5
"""


def wait_until(holds: Callable[[], object], seconds: float = 20.0, what: str = "") -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, f"waited {seconds:.0f} s in vain: {what or holds}"
        time.sleep(0.05)


class Bench:
    """A Redis server, what rollout and trainer hold of it, and the grading workers a test starts."""

    def __init__(self, folder: Path, more: str = "") -> None:
        """`more` lines go to the `[reward]` section."""
        self.folder = folder
        self.server = RedisServer(folder)
        self.server.start()
        self.config_file = folder / "run.toml"
        self.config_file.write_text(SETTINGS + more)
        self.environment = {"FORAGE_REDIS__URL": self.server.url, "FORAGE_REDIS__RETRY_S": "60"}
        self.config: Config = load_config(self.config_file, self.environment)
        self.app: Celery = grading_app(self.config)
        self.store = GroupStore(connect(self.config.redis), "test")
        self.broker = redis.Redis(port=self.server.port, db=self.config.reward.database)
        self.workers: list[GradingWorker] = []
        self.program = ["-m", "services.reward"]
        """What a worker's interpreter runs."""

    def start_worker(self, *, ready: bool = True) -> GradingWorker:
        worker = GradingWorker(self, f"worker{len(self.workers)}")
        self.workers.append(worker)
        if ready:
            wait_until(worker.is_ready, what=f"{worker.name} ready: {worker.output()}")
        return worker

    def notices(self) -> list[GradedNotice]:
        """Everything announced so far, whoever has read it."""
        entries = self.store.client.xrange(self.store.keys.graded)
        return [msgspec.msgpack.decode(fields[b"body"], type=GradedNotice) for _, fields in entries]

    def rewards(self) -> dict[str, float]:
        return {notice.trajectory_id: notice.reward for notice in self.notices()}

    def is_graded(self, trajectory_id: str) -> bool:
        return trajectory_id in self.rewards()

    def play(self, group_id: str, *answers: str, finished: bool = True) -> None:
        """A group as a rollout worker leaves it: one stored sample for each answer."""
        self.store.feed(make_group(group_id, samples=len(answers)))
        (lease,) = self.store.lease("worker", 1, 10)
        for sample, answer in enumerate(answers):
            self.store.store(make_trajectory(group_id, sample, answer=answer))
        if finished:
            assert self.store.finish(lease)

    def letters(self) -> list[DeadLetter]:
        """Everything buried so far, whoever has read it."""
        entries = self.store.client.xrange(self.store.keys.dead)
        return [msgspec.msgpack.decode(fields[b"body"], type=DeadLetter) for _, fields in entries]

    def in_hand(self) -> int:
        """Messages that a worker has taken and not acknowledged."""
        return self.broker.hlen("unacked")

    def close(self) -> None:
        for worker in self.workers:
            worker.end()
        self.server.kill()


def answers_ping(bench: Bench) -> bool:
    """Whether a worker answers Celery's remote control."""
    try:
        return bool(bench.app.control.inspect(timeout=3).ping())
    except (redis.RedisError, OSError):  # this process's own connection to the broker that went
        return False


class GradingWorker:
    def __init__(self, bench: Bench, name: str) -> None:
        self.name, self.heartbeat, self.log = name, bench.folder / f"{name}.heartbeat", bench.folder / f"{name}.log"
        environment = {**os.environ, **bench.environment, "FORAGE_HEARTBEAT_FILE": str(self.heartbeat)}
        environment["PYTHONPATH"] = os.pathsep.join([str(bench.folder), os.environ.get("PYTHONPATH", "")])  # for rewards of its own
        environment["FORAGE_LOG_LEVEL"] = "DEBUG"
        command = [sys.executable, *bench.program, "--config", str(bench.config_file)]
        self.process = subprocess.Popen(
            command, env=environment, stdout=self.log.open("w"), stderr=subprocess.STDOUT, start_new_session=True
        )

    def output(self) -> str:
        return self.log.read_text()

    def state(self) -> str:
        return self.heartbeat.read_text() if self.heartbeat.exists() else ""

    def is_ready(self) -> bool:
        assert self.process.poll() is None, self.output()
        return self.state().startswith("ready")

    def pool(self) -> list[int]:
        """Process ids of the pool's processes."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children")
        return [int(pid) for pid in children.read_text().split()]

    def kill_all(self) -> None:
        """SIGKILL to the whole process group, as when a machine goes."""
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def end(self) -> None:
        if self.process.poll() is None:
            self.kill_all()


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    """Shared by a module's tests: each uses trajectories with ids of its own."""
    made = Bench(tmp_path_factory.mktemp("bench"))
    yield made
    made.close()


@pytest.fixture(scope="module")
def worker(bench: Bench) -> GradingWorker:
    return bench.start_worker()


@pytest.fixture
def own_bench(tmp_path: Path) -> Iterator[Bench]:
    """For tests that break things."""
    made = Bench(tmp_path)
    yield made
    made.close()
